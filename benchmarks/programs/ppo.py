"""Proximal policy optimization that balances a pole on a cart."""

import torch
from cart_pole import Carts, Missed
from program import Program, Task, adams
from torch import nn

STEPS, CARTS, LENGTH, PASSES, DISCOUNT, TRACE, BOUND = 1600, 8, 32, 20, 0.98, 0.8, 0.2


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy, self.value = (
            nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)) for _ in range(2)
        )

    def forward(self, state):
        return self.policy(state).squeeze(-1), self.value(state).squeeze(-1)


def chance(logit, right):
    """Return the logarithm of the chance of an action."""
    return nn.functional.logsigmoid(torch.where(right, logit, -logit))


def make(seed):
    model, generator = Agent(), torch.Generator().manual_seed(seed)
    carts = Carts(CARTS, generator)
    played = {}

    @torch.no_grad()
    def play():
        """Let the policy push, and keep states, actions, their chances, gains and returns, [LENGTH, CARTS] each."""
        kept = []
        for _ in range(LENGTH):
            state = carts.state
            logit, value = model(state)
            right = torch.rand(CARTS, generator=generator) < logit.sigmoid()
            after, fell, anew = carts.step(right.float())
            reward = 1 + DISCOUNT * torch.where(anew & ~fell, model(after)[1], torch.zeros(CARTS))
            kept.append((state, right, chance(logit, right), value, reward, anew))
        states, rights, chances, values, rewards, ends = (torch.stack(each) for each in zip(*kept, strict=True))
        advantage, following, advantages = torch.zeros(CARTS), model(carts.state)[1], []
        for step in reversed(range(LENGTH)):
            surprise = rewards[step] + DISCOUNT * following * ~ends[step] - values[step]
            advantage = surprise + DISCOUNT * TRACE * advantage * ~ends[step]
            following = values[step]
            advantages.insert(0, advantage)
        gains = torch.stack(advantages)
        played.update(states=states, rights=rights, chances=chances, gains=gains, returns=gains + values)

    def loss(step):
        if step % PASSES == 0:
            play()
        logit, value = model(played["states"])
        gains = (played["gains"] - played["gains"].mean()) / (played["gains"].std() + 1e-8)
        ratio, bound = (chance(logit, played["rights"]) - played["chances"]).exp(), BOUND * (1 - step / STEPS)
        gain = torch.minimum(ratio * gains, ratio.clamp(1 - bound, 1 + bound) * gains)
        return 0.5 * (value - played["returns"]).square().mean() - gain.mean()

    return Task(model, loss, Missed(lambda state: model(state)[0]), clip=0.5)


def own(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


PROGRAM = Program(
    "proximal policy optimization that balances a pole",
    "Raffin 2020 (rl-baselines3-zoo, CartPole-v1): Adam, lr 1e-3 that falls to 0, gradients clipped to 0.5",
    STEPS,
    make,
    own,
    adams(STEPS, 3e-4, 1e-3, 3e-3),
    "share of 500 steps missed, mean of the run",
)
