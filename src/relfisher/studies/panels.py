"""The panels of figure 4: the images of each, and the problems that its runs solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from relfisher.studies.coordinates import Coordinates
from relfisher.studies.data import Dataset
from relfisher.studies.descent import Problems

__all__ = ["Panel", "PanelError", "panels", "problems"]

FASHION_PAIRS = ((0, 6), (2, 4))
DIGIT_PAIRS = ((3, 5), (4, 9))
LARGE_SUBSET, SMALL_SUBSET = 1000, 200
FEWEST_IMAGES = 20


class PanelError(ValueError):
    """Data do not allow a panel; the message is one line for the user about the argument `pair` or `size`."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument


@dataclass(frozen=True)
class Panel:
    """A panel of figure 4: two classes and their total number of images; `subset` if each run draws its own images."""

    pair: tuple[int, int]
    size: int
    subset: bool

    @property
    def classes(self) -> str:
        """The names of both classes."""
        return f"{self.pair[0]} vs {self.pair[1]}"

    def __str__(self) -> str:
        return f"{self.classes}, n = {self.size:,}"


def panels(
    data: Dataset, pairs: Sequence[tuple[int, int]] | None = None, sizes: Sequence[int | None] | None = None
) -> tuple[Panel, ...]:
    """Return the panels for a data set.

    Args:
        data: the data set.
        pairs: pairs of classes; None for 3 vs 5 and 4 vs 9, or on Fashion-MNIST T-shirt vs shirt and pullover vs coat.
        sizes: numbers of images, where None means all; None instead of a list for a subset and all.

    Returns:
        The panels: two classes and a size each.

    Raises:
        PanelError: if a pair is not two classes of the data, or the pair does not have enough images.
    """
    chosen = []
    for classes in pairs or (FASHION_PAIRS if data.name == "fashion-mnist" else DIGIT_PAIRS):
        _, signs = _images(data, classes)
        available = [int((signs == sign).sum()) for sign in (-1, 1)]
        if min(available) == 0 or classes[0] == classes[1]:
            raise PanelError("pair", f"{classes[0]} and {classes[1]} are not two classes of {data.name}")
        usual = LARGE_SUBSET if sum(available) >= 2 * LARGE_SUBSET else SMALL_SUBSET
        for size in (usual, None) if sizes is None else sizes:
            if size is not None and not FEWEST_IMAGES <= size <= 2 * min(available):
                allowed = f"allowed are {FEWEST_IMAGES} to {2 * min(available)}, or all"
                raise PanelError("size", f"{size} images of {classes[0]} and {classes[1]} in {data.name}: {allowed}")
            chosen.append(Panel(classes, size or sum(available), subset=size is not None))
    return tuple(dict.fromkeys(chosen))


def problems(
    data: Dataset, panel: Panel, coordinates: Callable[[Tensor], Coordinates], *, runs: int, initial_std: float
) -> Problems:
    """Draw the runs of a panel: initial weights and, unless all images are used, a balanced subset of both classes.

    Args:
        data: the data set.
        panel: two classes and a size.
        coordinates: computes the coordinates; every method gets the same draws.
        runs: the number of runs.
        initial_std: the standard deviation of the initial weights.

    Returns:
        The problems, with one data set that the runs share, or one for each run.
    """
    x, signs = _images(data, panel.pair)
    generator = torch.Generator().manual_seed(0)
    parameters = x.shape[1] + 1
    start = torch.randn(runs, parameters, generator=generator, dtype=x.dtype) * initial_std
    if panel.subset:
        draws = [_draw(signs, panel.size, generator) for _ in range(runs)]
        starts = list(torch.split(start, 1))
    else:
        draws, starts = [torch.arange(len(signs))], [start]
    found = [coordinates(x[draw]) for draw in draws]
    rank = max(entry.features.shape[1] for entry in found)
    return Problems(
        torch.stack([pad(entry.features, (0, rank - entry.features.shape[1])) for entry in found]),
        torch.stack([signs[draw] for draw in draws]),
        torch.stack([
            pad(theta @ entry.basis, (0, rank - entry.features.shape[1]))
            for theta, entry in zip(starts, found, strict=True)
        ]),
        parameters,
    )


def _images(data: Dataset, classes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return all images of two classes, validation images included, since section 5.1 considers only the training cost.

    Args:
        data: the data set.
        classes: the two classes.

    Returns:
        Pixels in float64, [n, 784], and +1 for the second class, -1 for the first, [n].
    """
    labels = torch.cat([data.train_labels, data.validation_labels])
    chosen = (labels == classes[0]) | (labels == classes[1])
    images = torch.cat([data.train_images, data.validation_images])[chosen].double()
    return images, torch.where(labels[chosen] == classes[1], 1.0, -1.0).double()


def _draw(signs: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return the indices of a random subset, half of it from each class."""
    halves = zip((-1, 1), (size - size // 2, size // 2), strict=True)
    members = [(signs == sign).nonzero().squeeze(1) for sign, _ in halves]
    counts = (size - size // 2, size // 2)
    return torch.cat([
        member[torch.randperm(len(member), generator=generator)[:count]]
        for member, count in zip(members, counts, strict=True)
    ])
