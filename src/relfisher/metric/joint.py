"""One metric over several named parts: its blocks, proposition 2, and the information of a part adjusted for others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from relfisher.metric.base import _DENSE_BLOCK, Metric
from relfisher.metric.scaled import ScaledBlocks, rounding
from relfisher.shapes import Float
from relfisher.validation import check_instance, check_interval

__all__ = ["AdjustedMetric", "JointMetric"]

# Columns of the identity that are multiplied at a time.
_COLUMNS = 256

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class JointMetric(Metric):
    """A metric whose parameters consist of named parts, such as those of several subsystems. Proposition 2.

    By proposition 2, the metric of some of the parameters, with the others as part of the reference, is a block of the
    metric of all. Products with a block are products with the whole metric, and no matrix is formed for them.

    Args:
        metric: the metric of all parameters.
        parts: the parameters by name, in the order of the metric, as they were given to `relative_fisher`. For any
            other parts, their places among the D flattened parameters, as tensors of integers; parameters without a
            part are then part of the reference.

    Attributes:
        parts: the shape of each part, by name. The parameters of this metric are the parts one after another, in the
            shape of the part if there is only one.

    Raises:
        ValueError: if there is no part, or the parts do not fit the metric or overlap.
        TypeError: if the metric or a part has the wrong type.
    """

    def __init__(self, metric: Metric, parts: Mapping[str, Tensor]) -> None:
        check_instance("metric", metric, Metric)
        places = _places(metric, parts)
        self.metric = metric
        self.parts = {name: tuple(each.shape) for name, each in places.items()}
        self._places = torch.cat([each.reshape(-1) for each in places.values()])
        size = len(self._places)
        shape = next(iter(self.parts.values())) if len(self.parts) == 1 else (size,)
        super().__init__(shape or (1,), metric.samples, metric.dtype, metric.device)
        self._semidefinite = metric._semidefinite
        own = torch.split(torch.arange(size, device=metric.device), [each.numel() for each in places.values()])
        self._own = {name: each.reshape(self.parts[name]) for name, each in zip(self.parts, own, strict=True)}

    def block(self, *names: str) -> JointMetric:
        """Return the metric of some parts, with all others as part of the reference. Proposition 2.

        Args:
            names: the names of the parts, in the order of the result.

        Returns:
            The block G_11.

        Raises:
            ValueError: if there is no part of a name, or a name is given twice.
        """
        self._check_names(names)
        return JointMetric(self, {name: self._own[name] for name in names})

    def adjusted_for(self, *names: str, damping: float = 0.0) -> AdjustedMetric:
        """Return the metric of the other parts when these parts are not known: the Schur complement.

        For parts 1 and nuisance parts 2 this is G_11 - G_12 G_22^+ G_21, the efficient information. It is at most the
        block G_11, in which parts 2 are known; where G is regular, its inverse is the block (G^-1)_11. It does not
        depend on the coordinates of parts 2.

        The pseudo-inverse of a singular G_22 gives the same result as any other generalized inverse, because G is
        positive semi-definite: directions of parts 2 that do not change the response carry no information about parts 1
        either. Source: Bickel, Klaassen, Ritov & Wellner 1993, chapter 2; van der Vaart 1998, section 25.4.

        Args:
            names: the names of the nuisance parts.
            damping: added to the diagonal of G_22, >= 0: the precision of a prior on parts 2, divided by the number of
                observations. The result grows with it, from the Schur complement towards the block G_11.

        Returns:
            The adjusted metric. Its products solve with G_22: by its eigenvectors, found once, for up to 4096 nuisance
            parameters, by conjugate residuals for more.

        Raises:
            ValueError: if there is no part of a name, no other part is left, or the damping is negative.
        """
        self._check_names(names)
        check_interval("damping", damping, 0, math.inf)
        kept = [name for name in self.parts if name not in names]
        if not kept:
            raise ValueError(f"names must leave a part that is not a nuisance, got all of {', '.join(names)}")
        return AdjustedMetric(self, kept, names, damping)

    def _check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError unless these are names of parts, each given once."""
        if not names or len(set(names)) < len(names) or not self.parts.keys() >= set(names):
            given = ", ".join(names) or "none"
            raise ValueError(f"names must be different parts of {', '.join(self.parts)}, got {given}")

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        return self.metric._product(self._embedded(vectors, self._places))[self._places]

    def _embedded(self, vectors: Float[Tensor, "K k"], places: Tensor) -> Float[Tensor, "N k"]:
        """Return vectors of all parameters with the given entries at some places, and 0 elsewhere."""
        return vectors.new_zeros(self.metric.shape[0], vectors.shape[1]).index_copy_(0, places, vectors)

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, len(self._places)

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return torch.cat([columns for _, columns in self._columns_of_matrix()], dim=1).unsqueeze(0)

    def _columns_of_matrix(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the columns of the matrix, some at a time, with their places."""
        for places in torch.split(torch.arange(self.shape[0], device=self.device), _COLUMNS):
            unit = torch.zeros(self.shape[0], len(places), dtype=self.dtype, device=self.device)
            unit[places, torch.arange(len(places))] = 1
            yield places, self._product(unit)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of the metric at these parts."""
        return self.metric.diagonal()[self._places]


class AdjustedMetric(JointMetric):
    """The metric of some parts of a joint metric when others are not known; see `JointMetric.adjusted_for`.

    In its matrix, eigenvalues within the rounding errors of G_11 are 0.

    Args:
        joint: the metric of all parts.
        kept: the names of the parts that the result is about.
        nuisance: the names of the parts that are not known.
        damping: added to the diagonal of G_22.
    """

    def __init__(self, joint: JointMetric, kept: list[str], nuisance: tuple[str, ...], damping: float) -> None:
        super().__init__(joint, {name: joint._own[name] for name in kept})
        self.known = joint.block(*kept)
        self.nuisance = joint.block(*nuisance)
        self.damping = damping

    @cached_property
    def _scaled_nuisance(self) -> ScaledBlocks | None:
        """The damped G_22, decomposed; None if it is too large to be formed."""
        return None if self.nuisance.shape[0] > _DENSE_BLOCK else self.nuisance._scaled(self.damping)

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        others, nuisance = self.nuisance._places, self._scaled_nuisance
        image = self.metric._product(self._embedded(vectors, self._places))
        right = image[others]
        if nuisance is None:
            explained = self.nuisance.natural_gradient(right, self.damping)
        else:
            explained = nuisance.pseudo_solve(right.double().unsqueeze(0))[0].to(self.dtype)
        return (image - self.metric._product(self._embedded(explained, others)))[self._places]

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        units = self.known.diagonal().abs().sqrt()
        units = units.where(units > 0, 1)
        matrix = super()._direct_sum() / units / units.unsqueeze(-1)
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        values = values.where(values.abs() > rounding(self.metric.shape[0], self.dtype), 0)
        cleaned: Tensor = (vectors * values.unsqueeze(-2)) @ vectors.mT
        return cleaned * units * units.unsqueeze(-1)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal, which takes a product with each unit vector."""
        return torch.cat([columns[places].diagonal() for places, columns in self._columns_of_matrix()])


def _places(metric: Metric, parts: Any) -> dict[str, Tensor]:
    """Return the places of each part among the flattened parameters, in the part's shape, after checking them."""
    check_instance("parts", parts, Mapping)
    for name, part in parts.items():
        check_instance(f"parts[{name!r}]", part, Tensor)
        if part.numel() == 0:
            raise ValueError(f"parts[{name!r}] must not be empty, got shape {tuple(part.shape)}")
    size, given = metric.shape[0], list(parts.values())
    if given and all(part.is_floating_point() for part in given):
        sizes = [part.numel() for part in given]
        if sum(sizes) != size:
            raise ValueError(f"parts must have the {size} parameters of the metric, got {sum(sizes)}")
        numbers = torch.split(torch.arange(size, device=metric.device), sizes)
        return {name: each.reshape(part.shape) for (name, part), each in zip(parts.items(), numbers, strict=True)}
    if not given or not all(part.dtype in _INTEGERS for part in given):
        kinds = ", ".join(f"{name}: {part.dtype}" for name, part in parts.items()) or "no part"
        raise TypeError(f"parts must be all parameters by name, or all tensors of integers, got {kinds}")
    places = torch.cat([part.reshape(-1) for part in given])
    if int(places.min()) < 0 or int(places.max()) >= size or len(torch.unique(places)) < len(places):
        raise ValueError(f"parts must be different places among the parameters, 0 to {size - 1}, got {parts}")
    return {name: part.to(metric.device, torch.long) for name, part in parts.items()}
