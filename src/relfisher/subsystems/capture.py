"""Forward hooks that gather each layer's batch metric, on the steps where one is due and on no others.

A forward pass counts once its gradients have flowed back, and only then: not one without gradients, for evaluation, or
left without a backward pass, and not the second one of activation checkpointing.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from relfisher.structures import Structure
from relfisher.subsystems.base import Call, Gathered, Subsystem
from relfisher.subsystems.roles import could_be_head, is_softmax_gradient, refuse, tell_roles
from relfisher.subsystems.samples import Held, Reservoir, Rows, Sampling
from relfisher.subsystems.watch import ActivationWatch

__all__ = ["Capture", "MaskWarning", "ResponseWarning", "TiedWarning"]


# The rules by which a layer's structure depends on what scores its outputs.
_LOOKING = ("auto", "kronecker")


class ResponseWarning(UserWarning):
    """The activation that follows a layer could not be told, so that the layer has the linear response."""


class TiedWarning(UserWarning):
    """The weights of a layer are also used outside its module, so that the layer has no metric."""


class MaskWarning(UserWarning):
    """A mask does not fit the samples of a layer that ran inside `masked`."""


class _Batch:
    """A layer's samples in one forward pass, or their statistics once all that they depend on is known.

    Without a limit to the samples of a step these are made as soon as the layer has a structure, unless the samples
    take less room; else at its end.
    """

    def __init__(self, layer: Subsystem, sampling: Sampling, *, due: bool) -> None:
        self.layer = layer
        self.due = due
        self.start = sampling.start
        self.count = sampling.count
        self.share = 1.0
        if sampling.count is not None and sampling.limit is not None:
            self.share = min(1.0, sampling.limit / max(sampling.start + sampling.count, 1))
        self.gathered: Gathered | None = None
        self.rows: Rows | None = None

    def gather(self) -> None:
        """Make the statistics of the samples, unless more may come that thin them out."""
        structure = self.layer.structure
        if self.rows is None or structure is None or self.count is not None:
            return
        if not self.due or self.rows.z.shape[-2] == 0:
            self.rows = None
        elif not _is_light(self.rows):
            self.gathered, self.rows = self.layer.gather(self.rows, structure), None


class Capture:
    """Watches the layers of a model.

    The first forward pass of the whole model tells each layer's response, and so its structure; a layer that is first
    reached later is told by the pass that follows. What scores an output layer is told by the gradients that flow back
    to it. Until then a layer's samples are held as they are.

    Args:
        model: the module whose forward pass tells the responses.
        choose: gives layers, in the order of the forward pass, their structures. It must not refer to what refers to
            this object, or the model would keep it alive.
        limit: about so many samples of a layer and step go into its statistics at most; None for all.

    Attributes:
        due: the modules whose statistics are due in the passes that come; those that are new are.
        refused: layers that were found to have no metric after all.
        empty: layers whose metric holds nothing yet, so that their statistics are due in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        choose: Callable[[Sequence[Subsystem]], Sequence[Structure]],
        limit: int | None = None,
    ) -> None:
        self.due: set[nn.Module] = set()
        self.refused: list[Subsystem] = []
        self.empty: set[Subsystem] = set()
        self._mask: Tensor | None = None
        self._masking: list[bool] = []  # for each call inside `masked`, whether it had an effect
        self._unmasked: set[Subsystem] = set()  # of which it was said that a mask did not fit
        self._choose = choose
        self._limit = limit
        self._layers: dict[nn.Module, list[Subsystem]] = {}
        self._missed: set[Subsystem] = set()  # not reached by the last pass that was watched
        self._outputs: set[Subsystem] = set()  # whose gradients are to tell what scores them
        self._inside = False
        self._watch: ActivationWatch | None = None
        self._held: list[_Batch] = []
        self._untold: list[_Batch] = []
        self._pending: dict[Subsystem, Rows | Gathered] = {}
        self._reservoirs: dict[Subsystem, Reservoir] = {}
        self._waiting: dict[Subsystem, weakref.WeakSet[_Batch]] = {}  # for gradients, if those ever flow back
        self._random_states: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_Hook(self._enter)),
            model.register_forward_hook(_Hook(self._leave), always_call=True),
        ]

    def add(self, layers: Sequence[Subsystem]) -> None:
        """Watch these layers, too."""
        for layer in layers:
            if layer.refused is not None:
                continue
            module = layer.module
            if module not in self._layers:
                self._layers[module] = []
                self.due.add(module)
                see = _Hook(self._seer(module))
                # Ahead of the hook that ends the watch, where the model itself is the layer.
                self._handles.append(module.register_forward_hook(see, with_kwargs=True, prepend=True))
            if layer.random and not any(other.random for other in self._layers[module]):
                self._handles.append(module.register_forward_pre_hook(_Hook(self._remember)))
            self._layers[module].append(layer)

    def take(self) -> dict[Subsystem, Rows | Gathered]:
        """Return the samples since the last call, or their statistics where these are lighter, and start anew."""
        if self._untold:
            untold, self._untold = self._untold[::-1], []  # gradients flow from the last layer to the first
            named = ", ".join(dict.fromkeys(batch.layer.name for batch in untold if batch.layer.followed))
            if named:
                self._warn(f"{named} ran outside the model's own forward pass, so that the activation is not known")
            self._conclude(untold, ActivationWatch())
            for batch in untold:
                self._add(batch)
        pending, self._pending = self._pending, {}
        for layer, reservoir in self._reservoirs.items():
            rows = reservoir.rows()
            if rows is not None and layer.structure is not None:
                pending[layer] = rows
        self.drop()
        return pending

    @property
    def waiting(self) -> bool:
        """Whether `take` has anything to return."""
        return bool(self._pending or self._untold or self._reservoirs)

    def drop(self) -> None:
        """Forget the samples whose gradients have flowed back since the last step."""
        self._pending.clear()
        self._untold.clear()
        self._reservoirs.clear()
        self._waiting.clear()

    def explains(self, layer: Subsystem) -> bool:
        """Return whether it is known why a layer has no structure: it is refused, or its gradients were all 0."""
        return layer.refused is not None or layer in self._outputs

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Leave positions out of the statistics in forward passes inside this context.

        Args:
            mask: True for what counts.

        Yields:
            Nothing.

        Raises:
            TypeError: if the mask is not boolean.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}: write mask.bool()")
        before = self._mask, self._masking
        self._mask, self._masking = mask, []
        try:
            yield
        finally:
            applied, (self._mask, self._masking) = self._masking, before
        if applied and not any(applied) and not self._unmasked:
            self._unmasked.update(layer for layers in self._layers.values() for layer in layers)
            warnings.warn(f"the mask {list(mask.shape)} was applied to no layer", MaskWarning, stacklevel=4)

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._stop_watching()
        self._held.clear()
        self._untold.clear()
        self.drop()

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the state of the random numbers before a call that needs them once more."""
        if self._wanted(module) and torch.is_grad_enabled():
            device = next(module.parameters()).device
            cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self._random_states[module] = torch.get_rng_state(), cuda

    def _wanted(self, module: nn.Module) -> bool:
        """Return whether a call of this module has anything to tell."""
        return any(self._due(layer) or layer.structure is None for layer in self._layers[module])

    def _due(self, layer: Subsystem) -> bool:
        """Return whether a layer's statistics are due."""
        return layer.module in self.due or layer in self.empty

    def _seer(self, module: nn.Module) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._wanted(module) or not torch.is_grad_enabled():
                return
            call = Call(args, kwargs, output, self._random_states.pop(module, None))
            for layer in self._layers[module]:
                z = layer.output(output)
                if z is not None and (self._due(layer) or layer.structure is None) and _counts(layer, z):
                    with torch.no_grad(), torch._C.DisableTorchFunction():
                        self._see(layer, call, z)

        return see

    def _see(self, layer: Subsystem, call: Call, z: Tensor) -> None:
        told = layer.structure is not None or layer in self._outputs
        if not told and self._inside and self._watch is None:
            self._missed.discard(layer)  # the next pass is watched
            return
        sampling = Sampling(self._limit, self._mask, self._started(layer))
        rows = layer.rows(call, sampling)
        if self._mask is not None:
            self._note_mask(layer, self._mask, sampling)
        batch = _Batch(layer, sampling, due=self._due(layer))
        if layer.structure is not None and batch.count is None:
            batch.rows = rows
            batch.gather()
            if batch.rows is not None:
                batch.rows = layer.hold(rows)
        else:
            # What works in place must not change what is held.
            batch.rows = layer.hold(rows)
            if batch.count is not None and batch.due:
                self._waiting.setdefault(layer, weakref.WeakSet()).add(batch)
            if self._watch is not None and not told:
                self._held.append(batch)
                if layer.followed:
                    self._watch.show(layer.name, z)
        z.register_hook(lambda gradient: self._count(batch, gradient))  # type: ignore[no-untyped-call]

    def _note_mask(self, layer: Subsystem, mask: Tensor, sampling: Sampling) -> None:
        """Note whether a mask was applied, and say so once of a layer for which it was meant, but did not fit."""
        self._masking.append(sampling.masked)
        if sampling.unmasked is not None and layer not in self._unmasked:
            self._unmasked.add(layer)
            message = f"the mask {list(mask.shape)} was not applied to {layer.name}, whose samples are "
            warnings.warn(f"{message}{list(sampling.unmasked)}: all of them count", MaskWarning, stacklevel=2)

    def _started(self, layer: Subsystem) -> int:
        """Return how many samples a layer has seen in this step, gradients that are still to flow back included."""
        reservoir = self._reservoirs.get(layer)
        seen = 0 if reservoir is None else reservoir.seen
        return seen + sum(batch.count or 0 for batch in self._waiting.get(layer, ()))

    def _count(self, batch: _Batch, gradient: Tensor) -> None:
        """Add a batch whose gradients have flowed back, once."""
        layer = batch.layer
        if layer in self._outputs and bool(torch.isfinite(gradient).all()):
            if not bool(gradient.any()):
                return  # it tells nothing
            self._outputs.discard(layer)
            layer.is_head = is_softmax_gradient(gradient)
            self._settle([layer])
        if layer.structure is None:
            if layer not in self._outputs and layer.refused is None:
                self._untold.append(batch)
            return
        self._add(batch)

    def _add(self, batch: _Batch) -> None:
        batch.gather()
        layer = batch.layer
        gathered, batch.gathered = batch.gathered, None
        rows, batch.rows = batch.rows, None
        told = gathered or rows
        if told is not None and batch.count is None:
            self._pending[layer] = _sum(layer, self._pending.get(layer), told)
        elif rows is not None and batch.due and batch.count is not None and self._limit is not None:
            if layer in self._waiting:
                self._waiting[layer].discard(batch)
            if layer not in self._reservoirs:
                self._reservoirs[layer] = Reservoir(self._limit)
            self._reservoirs[layer].add(Held(rows, batch.start, batch.count, batch.share))

    def _enter(self, model: nn.Module, args: object) -> None:
        self._inside = True
        if self._watch is None and torch.is_grad_enabled() and self._unknown() - self._missed:
            self._watch = ActivationWatch([each for layers in self._layers.values() for each in layers], model)
            self._watch.__enter__()

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._inside = False
        watch = self._stop_watching()
        held, self._held = self._held, []
        raised = output is None and sys.exc_info()[0] is not None
        if watch is not None and not raised:
            self._refuse(watch)
        if watch is not None and held and not raised:
            self._conclude(held, watch)
            self._missed = self._unknown()

    def _unknown(self) -> set[Subsystem]:
        """Return the layers that are trained, but have no structure yet."""
        return {
            layer
            for layers in self._layers.values()
            for layer in layers
            if layer.structure is None and any(parameter.requires_grad for parameter in layer.parameters)
        } - self._outputs

    def _stop_watching(self) -> ActivationWatch | None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
            watch.forget()
        return watch

    def _refuse(self, watch: ActivationWatch) -> None:
        """Let the layers go that have no metric after all, and say so."""
        refused = refuse(watch)
        for layer in refused:
            self._layers[layer.module].remove(layer)
            self._outputs.discard(layer)
        self.refused += refused
        if refused:
            named = "; ".join(f"{layer.name}, {layer.refused}" for layer in refused)
            warnings.warn(f"no metric for some layers: {named}", TiedWarning, stacklevel=2)

    def _conclude(self, batches: list[_Batch], watch: ActivationWatch) -> None:
        """Fix the responses and structures of layers, say which activations could not be told, gather what was held."""
        layers = list(
            dict.fromkeys(batch.layer for batch in batches if not (batch.layer.structure or batch.layer.refused))
        )
        tell_roles(watch, layers, self._layers)
        self._outputs.update(layer for layer in layers if layer.rule in _LOOKING and could_be_head(watch, layer))
        self._settle([layer for layer in layers if layer not in self._outputs])
        strange = {layer.name: takers for layer in layers if (takers := watch.untold(layer.name))}
        if strange:
            named = "; ".join(f"{name} feeds {', '.join(takers)}" for name, takers in strange.items())
            self._warn(f"the activation is not known: {named}")
        for batch in batches:
            batch.gather()

    def _settle(self, layers: Sequence[Subsystem]) -> None:
        """Give layers their structures."""
        for layer, structure in zip(layers, self._choose(layers), strict=True):
            layer.structure = structure

    def _warn(self, message: str) -> None:
        warnings.warn(f"linear response for some layers: {message}", ResponseWarning, stacklevel=3)


def _is_light(rows: Rows) -> bool:
    """Return whether a call has so few samples that they take less room than their statistics."""
    return not rows.x.is_sparse and rows.x.shape[-2] < rows.x.shape[-1]


def _sum(layer: Subsystem, before: Rows | Gathered | None, new: Rows | Gathered) -> Rows | Gathered:
    """Return what several calls of a layer with a structure tell: the only one's samples, else their statistics."""
    if before is None or layer.structure is None:
        return new
    first, second = (layer.gather(each, layer.structure) if isinstance(each, Rows) else each for each in (before, new))
    first.add(second)
    return first


def _counts(layer: Subsystem, z: Tensor) -> bool:
    """Return whether gradients can flow back through this output, outside torch.func's transforms."""
    if not z.requires_grad or not any(parameter.requires_grad for parameter in layer.parameters):
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
