"""A public program in a few lines: a model, its data, its loss, and how its authors train it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class Task:
    """One run of a program.

    Args:
        model: what is trained.
        loss: returns the loss of a step, given its number.
        error: returns the validation error; lower is better. It is called in evaluation mode, without gradients.
        clip: the norm to which gradients are clipped; None for none.
        rival: another network and its loss; it takes its step before each one of the model, by an optimizer of its own.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    error: Callable[[], float]
    clip: float | None = None
    rival: tuple[nn.Module, Callable[[int], Tensor]] | None = None


@dataclass(frozen=True)
class Program:
    """A program with the optimizer of its authors.

    Args:
        title: what it is.
        origin: whose program and settings these are.
        steps: the number of steps.
        make: returns a run for a seed.
        own: makes the optimizer of the authors, at their settings.
        tuned: other optimizers or settings, of which the best is taken.
        measure: what the error is.
        recipe: the options of RNGD that the documentation recommends for programs of this kind.
    """

    title: str
    origin: str
    steps: int
    make: Callable[[int], Task]
    own: Make
    tuned: dict[str, Make]
    measure: str
    recipe: dict[str, object] = field(default_factory=dict)


def with_cosine(make: Make, steps: int) -> Make:
    """Return an optimizer whose learning rates fall to 0 by a cosine."""

    def made(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    return made


def adam(lr: float, **options: object) -> Make:
    """Return Adam, or AdamW if there is a `weight_decay`."""
    kind = torch.optim.AdamW if "weight_decay" in options else torch.optim.Adam
    return lambda model: kind(model.parameters(), lr, **options)


def adams(steps: int, *rates: float, **options: object) -> dict[str, Make]:
    """Return Adam at some rates, constant and with a cosine."""
    constant = {f"Adam, lr {lr:g}": adam(lr, **options) for lr in rates}
    return {**constant, **{f"{name}, cosine": with_cosine(make, steps) for name, make in constant.items()}}


def batch(step: int, count: int, size: int, seed: int) -> Tensor:
    """Return the places of a mini-batch: passes over the data in a new order each."""
    per_pass = count // size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + step // per_pass))
    return order[(step % per_pass) * size :][:size]
