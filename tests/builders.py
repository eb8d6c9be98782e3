"""Models, inputs and steps of training that tests share, and what they read off an optimizer's saved state."""

import copy
import io
import itertools

import torch
from torch import nn

from relfisher import layer_metric


def mlp(activation=nn.Tanh, sizes=(6, 5, 4, 3), *, seed=0, bias=True, dtype=torch.float64):
    torch.manual_seed(seed)
    pairs = itertools.pairwise(sizes)
    layers = [module for a, b in pairs for module in (nn.Linear(a, b, bias=bias), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def normed_mlp(width=5, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 3)).to(dtype)


class Following(nn.Module):
    """One layer, and the activation that follows."""

    def __init__(self, layer, activation=torch.tanh):
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        return self.activation(output[0] if isinstance(output, tuple) else output)


class Code(nn.Module):
    """x -> head(f(fc(x))), with f any code."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
        self.activation = activation

    def forward(self, x):
        return self.head(self.activation(self.fc(x)))


class EveryKind(nn.Module):
    """Tokens through a layer of each kind, with dropout inside attention and between recurrent layers."""

    def __init__(self, without=()):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.batch = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.slope = nn.PReLU(8)
        kind = nn.GRU if "LSTM" in without else nn.LSTM
        self.lstm = kind(8, 4, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.group = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.rms = nn.RMSNorm(8)
        self.wide, self.narrow = nn.Linear(8, 520), nn.Linear(520, 8)  # so wide that its inverse is of low rank
        self.bag = nn.EmbeddingBag(7, 8)
        self.pair = nn.Linear(8, 5) if "Bilinear" in without else nn.Bilinear(8, 8, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 7)

    def forward(self, tokens):
        h = torch.relu(self.batch(self.conv(self.embed(tokens).mT))).mT
        h = h + self.attention(h, h, h)[0]
        h = self.norm(self.slope(h.mT).mT)
        h = h + self.lstm(h)[0]
        h = h + self.gru(h)[0]
        h = self.rms(torch.relu(self.up(self.group(h.mT))).mT)
        h = torch.relu(self.narrow(torch.relu(self.wide(h)))) + self.bag(tokens).unsqueeze(1)
        z = self.pair(h, h) if isinstance(self.pair, nn.Bilinear) else self.pair(h)
        return self.head(torch.tanh(z) * self.scale)


KINDS = (
    *("Embedding", "EmbeddingBag", "Conv1d", "ConvTranspose1d", "MultiheadAttention", "LSTM", "GRU"),
    *("BatchNorm1d", "LayerNorm", "RMSNorm", "GroupNorm", "PReLU", "Bilinear", "Linear"),
)


def every_kind(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return EveryKind(**options).to(dtype)


def inputs(seed=0, n=16, width=6, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(seed=0, n=16, width=6, dtype=torch.float64):
    """Inputs and the class of each, which is the largest of its first three numbers."""
    x = inputs(seed, n, width, dtype)
    return x, x[:, :3].argmax(1)


def sentences(seed=0, n=6, length=5, count=7):
    return torch.randint(count, (n, length), generator=torch.Generator().manual_seed(seed))


def squares(model, x):
    return (model(x) - 1).square().mean()


def classified(model, given):
    x, y = given
    return nn.functional.cross_entropy(model(x), y)


def repeated(model, tokens):
    """The loss of a model that is to say each token again."""
    return nn.functional.cross_entropy(model(tokens).flatten(0, -2), tokens.flatten())


def predicted(model, tokens, reduction="mean"):
    """The loss of a model that is to say the token of the sentence before."""
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten(), reduction=reduction)


def step(model, optimizer, given, loss=squares):
    optimizer.zero_grad()
    value = loss(model, given)
    value.backward()
    optimizer.step()
    return value.item()


def skipped(optimizer):
    """Take a step with the gradients at hand, and return how many were skipped so far."""
    optimizer.step()
    return optimizer.health.skipped_steps


def train(model, optimizer, steps, first=0):
    return [step(model, optimizer, batch(seed), classified) for seed in range(first, first + steps)]


def learn(model, optimizer, tokens, steps=3):
    return [step(model, optimizer, tokens, repeated) for _ in range(steps)]


def predict(model, optimizer, seed):
    """Take a step of a network of every kind, whose dropout depends on the seed alone."""
    torch.manual_seed(seed)
    return step(model, optimizer, sentences(seed), predicted)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moves(model, optimizer, given, loss=squares):
    """How far a step moves each parameter, by its name."""
    before = weights(model)
    step(model, optimizer, given, loss)
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def moved(model, optimizer, given, loss=squares):
    """The names of the parameters that a step moves."""
    return {name for name, move in moves(model, optimizer, given, loss).items() if bool(move.any())}


def assert_same_weights(model, *others):
    for other in others:
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


def assert_close_weights(model, other, **tolerances):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, **tolerances)


def through_a_file(state):
    """What comes back of a state that is saved, and loaded as one that holds nothing but data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(model, optimizer, **options):
    """A copy of the model and an optimizer of its own, which has loaded what the other one saved."""
    twin = copy.deepcopy(model)
    other = type(optimizer)(twin, **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return twin, other


def named_parameters(optimizer):
    groups = [zip(group["param_names"], group["params"], strict=True) for group in optimizer.param_groups]
    return dict(itertools.chain(*groups))


def by_name(optimizer):
    """The state of each parameter that has one, by its name."""
    named = named_parameters(optimizer)
    return {name: optimizer.state[parameter] for name, parameter in named.items() if optimizer.state.get(parameter)}


def metrics(optimizer):
    """The running metric of each layer, by the name of its weight, or of its bias where that alone is given."""
    return {name: state["metric"] for name, state in by_name(optimizer).items() if "metric" in state}


def average(optimizer, module, key="metric"):
    """The average of the metrics of the batches that a layer has seen."""
    state = optimizer.state[module.weight]
    return state[key] / float(state["ema_weight"])


def expected_blocks(layer, x, response):
    """The exact neuron blocks of a linear layer as it is now, with these inputs."""
    return layer_metric(x, layer.weight.detach().clone(), layer.bias.detach().clone(), response).blocks()


def structures_by_weight(optimizer):
    """The structure of each layer that has seen a batch, by what its state holds and the name of its weight."""
    found = {}
    for name, parameter in named_parameters(optimizer).items():
        state = optimizer.state.get(parameter, {})
        if "metric" in state and float(state["ema_weight"]) > 0:
            # The channels of a normalisation are groups of one unit each.
            axes = state["momentum"].ndim if "momentum" in state else 3 if parameter.ndim == 1 else 2
            kind = {-1: "diagonal", 0: "shared", 1: "neuron"}[state["metric"].ndim - axes]
            found[name] = "kronecker" if "output" in state else kind
    return found


def structures(optimizer):
    return {name.rpartition(".")[0]: kind for name, kind in structures_by_weight(optimizer).items()}


def squared_length(state, move):
    """The squared length of a layer's move in the damped metric whose inverse is kept."""
    damped = torch.linalg.inv(state["inverse"])
    image = torch.einsum("oij,oj->oi", damped, move) if damped.ndim == 3 else move @ damped
    if "output_inverse" in state:
        image = torch.linalg.inv(state["output_inverse"]) @ image
    return float((move * image).sum())


def affine(named, layer):
    """The weights and biases of a linear layer, of what is named by parameters, as one matrix with the bias last."""
    return torch.cat([named[f"{layer}.weight"], named[f"{layer}.bias"].unsqueeze(1)], 1)


def is_hooked(model):
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


#: The keys of the few numbers of a layer.
FEW = ("ema_weight", "updates", "trainable", "is_head", "log_norm_stats", "uncorrelated", "step")


def taken(optimizer):
    """Return the bytes of the state, but for the few numbers of a layer."""
    pairs = [pair for state in optimizer.state.values() for pair in state.items()]
    return sum(value.numel() * value.element_size() for key, value in pairs if key not in FEW)
