"""Forward hooks that gather each layer's batch metric, on the steps where one is due and on no others.

A forward pass counts once its gradients have flowed back, and only then: not one without gradients, for evaluation, or
left without a backward pass, and not the second one of activation checkpointing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from relfisher.structures import Structure
from relfisher.subsystems.discover import ActivationWatch
from relfisher.subsystems.linear import LinearSubsystem

__all__ = ["Capture", "Gathered", "ResponseWarning"]


class ResponseWarning(UserWarning):
    """The activation that follows a layer could not be told, so that the layer has the linear response."""


@dataclass
class Gathered:
    """A layer's metric summed over the samples since the last step."""

    total: Tensor
    samples: int


class _Batch:
    """A layer's samples in one forward pass, and their summed metric once the layer's structure is known."""

    def __init__(self, layer: LinearSubsystem, augmented: Tensor, z: Tensor, *, due: bool) -> None:
        self.layer = layer
        self.due = due
        self.samples = augmented.shape[0]
        self.total: Tensor | None = None
        self._rows: tuple[Tensor, Tensor] | None = (augmented, z)

    def hold(self) -> None:
        """Keep the samples until the structure is known; what works in place must not change them."""
        if self._rows is not None:
            augmented, z = self._rows
            self._rows = (augmented.clone(), z.clone())

    def gather(self) -> None:
        """Make the metric, and let the samples go."""
        structure = self.layer.structure
        if self.due and structure is not None and self._rows is not None:
            augmented, z = self._rows
            with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
                self.total = structure.gather(augmented, z, self.layer.response)
        self._rows = None


class Capture:
    """Watches the layers of a model.

    The first forward pass of the whole model tells each layer's response, and so its structure; a layer that is first
    reached later is told by the pass that follows. Until then its samples are held as they are.

    Args:
        model: the module whose forward pass tells the responses.
        layers: its subsystems; their `response` and `structure` are set here.
        choose: gives layers, in the order of the forward pass, their structures. It must not refer to what refers to
            this object, or the model would keep it alive.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearSubsystem],
        choose: Callable[[list[LinearSubsystem]], list[Structure]],
    ) -> None:
        self.due = True
        self._choose = choose
        self._layers = layers
        self._missed: set[LinearSubsystem] = set()  # not reached by the last pass that was watched
        self._inside = False
        self._watch: ActivationWatch | None = None
        self._held: list[_Batch] = []
        self._untold: list[_Batch] = []
        self._pending: dict[LinearSubsystem, Gathered] = {}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_Hook(self._enter)),
            *(layer.module.register_forward_hook(_Hook(self._seer(layer)), with_kwargs=True) for layer in layers),
            model.register_forward_hook(_Hook(self._leave), always_call=True),
        ]

    def take(self) -> dict[LinearSubsystem, Gathered]:
        """Return what was gathered since the last call, and start anew."""
        if self._untold:
            untold, self._untold = self._untold[::-1], []  # gradients flow from the last layer to the first
            named = ", ".join(dict.fromkeys(batch.layer.name for batch in untold))
            self._warn(f"{named} ran outside the model's own forward pass, so that the activation is not known")
            self._conclude(untold, ActivationWatch())
            for batch in untold:
                self._add(batch)
        pending, self._pending = self._pending, {}
        return pending

    def drop(self) -> None:
        """Forget the samples since the last step."""
        self._pending.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._stop_watching()
        self._held.clear()
        self._untold.clear()
        self.drop()

    def _seer(self, layer: LinearSubsystem) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Any) -> None:
            if (self.due or layer.structure is None) and torch.is_grad_enabled() and _counts(layer, z):
                self._see(layer, args[0] if args else kwargs["input"], z)

        return see

    def _see(self, layer: LinearSubsystem, x: Tensor, z: Tensor) -> None:
        if layer.structure is None and self._inside and self._watch is None:
            self._missed.discard(layer)  # the next pass is watched
            return
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        rows = z.detach().reshape(-1, layer.out).to(dtype)
        batch = _Batch(layer, layer.samples(x.detach()).to(dtype), rows, due=self.due)
        if layer.structure is not None:
            batch.gather()
        else:
            batch.hold()
            if self._watch is not None:
                self._held.append(batch)
                self._watch.show(layer.name, z)
        z.register_hook(lambda _: self._count(batch))  # type: ignore[no-untyped-call]  # torch's is not annotated

    def _count(self, batch: _Batch) -> None:
        """Add a batch whose gradients have flowed back, once."""
        if batch.layer.structure is None:
            self._untold.append(batch)
        else:
            self._add(batch)

    def _add(self, batch: _Batch) -> None:
        total, batch.total = batch.total, None
        if total is None or batch.samples == 0:
            return
        entry = self._pending.get(batch.layer)
        if entry is None:
            self._pending[batch.layer] = Gathered(total, batch.samples)
        else:
            entry.total.add_(total)
            entry.samples += batch.samples

    def _enter(self, *_: object) -> None:
        self._inside = True
        if self._watch is None and torch.is_grad_enabled() and self._unknown() - self._missed:
            self._watch = ActivationWatch()
            self._watch.__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._inside = False
        watch = self._stop_watching()
        held, self._held = self._held, []
        raised = output is None and sys.exc_info()[0] is not None
        if watch is not None and held and not raised:
            self._conclude(held, watch)
            self._missed = self._unknown()

    def _unknown(self) -> set[LinearSubsystem]:
        """Return the layers that are trained, but have no structure yet."""
        return {layer for layer in self._layers if layer.structure is None and layer.weight.requires_grad}

    def _stop_watching(self) -> ActivationWatch | None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's mode is not annotated
            watch.forget()
        return watch

    def _conclude(self, batches: list[_Batch], watch: ActivationWatch) -> None:
        """Fix the responses and structures of layers, say which activations could not be told, gather what was held."""
        layers = list(dict.fromkeys(batch.layer for batch in batches if batch.layer.structure is None))
        for layer in layers:
            layer.response = watch.response(layer.name)
        for layer, structure in zip(layers, self._choose(layers), strict=True):
            layer.structure = structure
        untold = {layer.name: takers for layer in layers if (takers := watch.untold(layer.name))}
        if untold:
            named = "; ".join(f"{name} feeds {', '.join(takers)}" for name, takers in untold.items())
            self._warn(f"the activation is not known: {named}")
        for batch in batches:
            batch.gather()

    def _warn(self, message: str) -> None:
        warnings.warn(f"linear response for some layers: {message}", ResponseWarning, stacklevel=3)


def _counts(layer: LinearSubsystem, z: Any) -> bool:
    """Return whether gradients can flow back through this output, outside torch.func's transforms."""
    if not isinstance(z, Tensor) or not z.requires_grad or not layer.weight.requires_grad:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(z)


class _Hook:
    """A hook that stays with its module: a copy of the model, or a pickled one, is not watched."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    @_disable_dynamo  # what a hook gathers is no part of a compiled graph
    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: object) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """What a copied hook becomes."""

    def __call__(self, *args: object) -> None:
        pass
