"""Poles on carts, many at a time: Barto, Sutton and Anderson 1983, with the numbers of Gymnasium's CartPole-v1."""

import torch

LONGEST = 500


class Carts:
    """Independent carts; one whose pole falls, or that has stood for `LONGEST` steps, starts anew."""

    def __init__(self, count, generator):
        self.generator, self.age = generator, torch.zeros(count, dtype=torch.long)
        self.state = self._start(count)

    def _start(self, count):
        return torch.rand(count, 4, generator=self.generator) * 0.1 - 0.05

    def step(self, right):
        """Push each cart to the right or to the left.

        Returns:
            the states [n, 4] after the push, before any starts anew; which poles fell [n]; which carts start anew [n].
        """
        _, speed, angle, turn = self.state.unbind(1)
        force = 20.0 * right - 10.0
        sine, cosine = angle.sin(), angle.cos()
        push = (force + 0.05 * turn**2 * sine) / 1.1
        bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        change = torch.stack([speed, push - 0.05 * bend * cosine / 1.1, turn, bend], 1)
        after, self.age = self.state + 0.02 * change, self.age + 1
        fell = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 0.2095)
        anew = fell | (self.age >= LONGEST)
        self.state = torch.where(anew[:, None], self._start(len(anew)), after)
        self.age = self.age * ~anew
        return after, fell, anew


class Missed:
    """The share of the longest time that a policy misses, in the mean of all times that it was asked for."""

    def __init__(self, policy, count=20):
        """Take a policy that pushes to the right where it is positive, and the number of carts."""
        self.policy, self.count, self.shares = policy, count, []

    def __call__(self):
        carts, standing, total = Carts(self.count, torch.Generator().manual_seed(0)), torch.ones(self.count).bool(), 0
        for _ in range(LONGEST):
            total += int(standing.sum())
            standing = standing & ~carts.step(self.policy(carts.state) > 0)[1]
        self.shares.append(1 - total / (LONGEST * self.count))
        return sum(self.shares) / len(self.shares)
