"""What every optimizer of torch does, RNGD does: on a network with a layer of every kind."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.swa_utils import SWALR

from relfisher import RNGD


class Net(nn.Module):
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
        h = self.norm(h + self.attention(h, h, h)[0])
        h = self.slope(h.mT).mT
        h = h + self.lstm(h)[0]
        h = h + self.gru(h)[0]
        h = self.rms(torch.relu(self.up(self.group(h.mT))).mT)
        h = torch.relu(self.narrow(torch.relu(self.wide(h)))) + self.bag(tokens).unsqueeze(1)
        z = self.pair(h, h) if isinstance(self.pair, nn.Bilinear) else self.pair(h)
        return self.head(torch.tanh(z) * self.scale)


LAYERS = (
    *("Embedding", "EmbeddingBag", "Conv1d", "ConvTranspose1d", "MultiheadAttention", "LSTM", "GRU"),
    *("BatchNorm1d", "LayerNorm", "RMSNorm", "GroupNorm", "PReLU", "Bilinear", "Linear"),
)


def supports(what, without=()):
    return pytest.mark.supports(what, *(layer for layer in LAYERS if layer not in without))


def net(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def tokens(seed, n=6):
    return torch.randint(7, (n, 5), generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed, n=6, reduction="mean"):
    x = tokens(seed, n)
    return nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten(), reduction=reduction)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    optimizer.step()
    return loss.item()


@supports("RNGD learns with all of them in one network")
def test_learns_with_every_kind_of_layer():
    model = net()
    optimizer = RNGD(model, lr=0.1)
    losses = [step(model, optimizer, seed) for seed in range(120)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert {name for group in optimizer.param_groups for name in group["param_names"] if group["kind"] == "adamw"} == {
        "scale"
    }
    ranked = {layer.name for layer in optimizer._place if "rank" in layer.structure.label(layer.shape)}
    assert ranked == {"narrow"}


@supports("resumes bitwise from a state in the middle of an interval, for each step rule")
@pytest.mark.parametrize("rule", ["trust-region", "normalized", "spectral"])
@pytest.mark.parametrize("saved_at", [3, 8])
def test_resumes_bitwise_in_the_middle_of_an_interval(rule, saved_at):
    options = {"stats_interval": 2, "refresh_interval": 6, "momentum": 0.5, "step_rule": rule, "weight_decay": 0.01}
    model = net()
    optimizer = RNGD(model, **options)
    for seed in range(saved_at):
        step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = net()
    other = RNGD(twin, **options)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for seed in range(saved_at, saved_at + 10):
        assert step(model, optimizer, seed) == step(twin, other, seed)


@supports("accumulated gradients equal the large batch")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_gradients_equal_the_large_batch(reduction):
    """Four passes of 3 samples are one of 12; batch norm in evaluation mode, since its batches differ."""

    def parts(seed):
        return tokens(seed, 12).split(3)

    whole, pieces = net(), net()
    one, two = (
        RNGD(whole, step_rule="trust-region", trust_region=1e-3),
        RNGD(pieces, step_rule="trust-region", trust_region=1e-3),
    )
    for model in (whole, pieces):
        model.eval()
    for seed in range(8):
        for model, optimizer, batches in ((whole, one, [tokens(seed, 12)]), (pieces, two, parts(seed))):
            optimizer.zero_grad()
            for x in batches:
                out = model(x).flatten(0, 1)
                loss = nn.functional.cross_entropy(out, x.roll(1, 1).flatten(), reduction=reduction)
                (loss / len(batches) if reduction == "mean" else loss).backward()
            optimizer.step()
        for mine, theirs in zip(whole.parameters(), pieces.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda _: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": True},
    "OneCycleLR": {"max_lr": [0.1, 0.01], "total_steps": 8, "cycle_momentum": False},
    "ReduceLROnPlateau": {"patience": 0},
    "SWALR": {"swa_lr": [0.05, 0.01], "anneal_epochs": 3},
}


def scheduler_of(name, optimizer):
    """Return a scheduler of torch; the two that are made of others from two that are tried by themselves."""
    parts = "LinearLR", "ExponentialLR"
    match name:
        case "SequentialLR":
            return lr_scheduler.SequentialLR(optimizer, [scheduler_of(part, optimizer) for part in parts], [2])
        case "ChainedScheduler":
            return lr_scheduler.ChainedScheduler([scheduler_of(part, optimizer) for part in parts])
        case "SWALR":
            return SWALR(optimizer, **SCHEDULERS[name])
    return getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])


@pytest.mark.parametrize("name", [*SCHEDULERS, "SequentialLR", "ChainedScheduler"])
def test_every_scheduler_moves_the_learning_rates(name):
    model = net()
    optimizer = RNGD(model, momentum=0.5)
    scheduler = scheduler_of(name, optimizer)
    seen = set()
    for seed in range(6):
        seen.add(tuple(float(group["lr"]) for group in optimizer.param_groups))
        step(model, optimizer, seed)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 1
    assert len({rates[1] for rates in seen}) > 1, "AdamW's learning rate follows, too"


def test_each_scheduler_of_torch_is_tried():
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and name[0] != "_"
    }
    assert known - {"LRScheduler"} == {*SCHEDULERS, "SequentialLR", "ChainedScheduler"}


def test_a_closure_is_evaluated_first_and_its_loss_returned():
    model, twin = net(), net()
    one, two = RNGD(model), RNGD(twin)
    for seed in range(4):

        def closure(seed=seed):
            torch.manual_seed(seed)
            one.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        assert one.step(closure).item() == step(twin, two, seed)


def test_clipped_gradients_move_as_smaller_ones_do():
    model = net()
    optimizer = RNGD(model, lr=1e-3, step_rule="trust-region", trust_region=None)
    torch.manual_seed(0)
    loss_of(model, 0).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = model.head.weight.detach().clone()
    optimizer.step()
    clipped = (model.head.weight - before).norm()
    plain = net()
    optimizer = RNGD(plain, lr=1e-3, step_rule="trust-region", trust_region=None)
    step(plain, optimizer, 0)
    assert 0 < clipped < 0.1 * (plain.head.weight - before).norm()


def test_several_models_and_losses_in_a_step_keep_their_samples_apart():
    """The discriminator sees fakes in the generator's step; clearing its gradients clears those samples."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    one, two = RNGD(generator, stats_interval=1), RNGD(critic, stats_interval=1, unbiased=True, decay=0.0)
    for seed in range(4):
        noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        real = noise.new_ones(8, 4) * noise[:, :1]
        two.zero_grad()
        seen = [real, generator(noise).detach()]
        (critic(seen[1]).mean() - critic(seen[0]).mean()).backward()
        two.step()
        x = torch.cat([torch.cat(seen), noise.new_ones(16, 1)], 1)
        torch.testing.assert_close(two.state[critic[0].weight]["metric"], x.T @ x / 16)
        one.zero_grad()
        (-critic(generator(noise)).mean()).backward()
        one.step()


def test_two_optimizers_may_share_a_model():
    model = net()
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
    one, two = RNGD(model, params=body), RNGD(model, params=list(model.head.parameters()), step_rule="spectral")
    for seed in range(3):
        before = copy.deepcopy(model.state_dict())
        torch.manual_seed(seed)
        model.zero_grad()
        loss_of(model, seed).backward()
        two.step()
        after = model.state_dict()
        changed = {name for name, _ in model.named_parameters() if not torch.equal(before[name], after[name])}
        assert changed == {"head.weight", "head.bias"}
        one.step()


def test_the_optimizer_is_a_context_that_takes_its_hooks_off():
    model = net()
    with RNGD(model) as optimizer:
        step(model, optimizer, 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def autocast(dtype, *without):
    return pytest.param(dtype, without, marks=supports(f"autocast in {str(dtype).removeprefix('torch.')}", without))


@pytest.mark.parametrize(
    ("dtype", "without"), [autocast(torch.float16, "Bilinear", "LSTM"), autocast(torch.bfloat16, "Bilinear")]
)
def test_autocast_keeps_a_float32_state_for_every_layer(dtype, without):
    """But for those that torch's autocast cannot run, or runs on some processors only."""
    model = net(torch.float32, without=without)
    optimizer = RNGD(model, stats_interval=1, refresh_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(4):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, seed)
            loss.backward()
            optimizer.step()
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert optimizer.health.failed_refreshes == optimizer.health.dropped_batches == 0
