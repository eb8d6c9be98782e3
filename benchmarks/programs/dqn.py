"""A deep Q network that balances a pole on a cart."""

import copy

import torch
from cart_pole import Carts, Missed
from program import Program, Task, adams
from torch import nn
from torch.nn.functional import smooth_l1_loss

STEPS, CARTS, BATCH, DISCOUNT, FOLLOW = 2000, 8, 128, 0.99, 0.005


def make(seed):
    sizes = (nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    model, generator = nn.Sequential(*sizes), torch.Generator().manual_seed(seed)
    target, carts = copy.deepcopy(model).requires_grad_(requires_grad=False), Carts(CARTS, generator)
    memory = torch.zeros(STEPS * CARTS, 10)  # state, action, next state, whether the pole fell

    def loss(step):
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, FOLLOW)
            chance = 0.05 + 0.85 * 0.995**step
            random = torch.rand(CARTS, generator=generator) < chance
            any_action = torch.randint(2, (CARTS,), generator=generator)
            before = carts.state
            action = torch.where(random, any_action, model(before).argmax(1))
            after, fell, _ = carts.step(action.float())
            new = torch.cat([before, action[:, None], after, fell[:, None]], 1)
            memory[step * CARTS : (step + 1) * CARTS] = new
            rows = memory[torch.randint((step + 1) * CARTS, (BATCH,), generator=generator)]
            wanted = 1 + DISCOUNT * (1 - rows[:, 9]) * target(rows[:, 5:9]).amax(1)
        values = model(rows[:, :4]).gather(1, rows[:, 4:5].long()).squeeze(1)
        return smooth_l1_loss(values, wanted)

    return Task(model, loss, Missed(lambda state: model(state).diff(dim=1)[:, 0]))


def own(model):
    return torch.optim.AdamW(model.parameters(), 3e-4, amsgrad=True)


PROGRAM = Program(
    "a deep Q network that balances a pole",
    "PyTorch's tutorial: AdamW, lr 3e-4, amsgrad",
    STEPS,
    make,
    own,
    adams(STEPS, 3e-4, 1e-3, 3e-3, weight_decay=0.01),
    "share of 500 steps missed, mean of the run",
)
