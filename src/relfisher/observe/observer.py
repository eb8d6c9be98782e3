"""Forward hooks on the layers of a model: determine each layer's role once, and collect samples on the due steps.

A forward pass counts only after its gradients have flowed back. Passes without gradients, for evaluation, passes
without a backward pass, and the recomputation of activation checkpointing are ignored.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relfisher.layers import Call, EmbeddingLayer, Layer, Rows, Sampling, SpreadOperation
from relfisher.observe import messages
from relfisher.observe.activations import Responses
from relfisher.observe.entries import Entries
from relfisher.observe.hooks import inner_hook, is_compiled
from relfisher.observe.operations import Operations, is_inside
from relfisher.observe.passes import Pass, counts, is_computed, is_recomputed
from relfisher.observe.roles import Role, is_softmax_gradient, needs_gradient, roles_of
from relfisher.observe.statistics import Batch, Reading, Reserved, Sampler, Streamed
from relfisher.observe.trace import Trace
from relfisher.structures import Statistics

__all__ = ["Observer"]


class Observer:
    """Observes the layers of a model, independently of how the observations are used.

    The first forward pass that reaches a layer determines its role. The gradients of an output layer show how it is
    scored; until its role is known, its samples are held as rows. What one thread observes does not depend on the
    passes of others.

    Args:
        model: the module whose forward passes determine the roles, or those of parts that are called by themselves.
        responses: responses by activation.
        limit: the approximate maximum number of samples per layer and step in the statistics; None for all.

    Attributes:
        model: a weak reference to the model.
        roles: the roles of layers, as far as they are known, in the order in which the layers first ran.
        due: the modules whose statistics are due in the next passes; new modules are due.
        uninitialized: layers without statistics so far, which are always due.
        readings: the structure and response for the statistics of each layer; other layers are held as rows.
        heads: whether output layers are heads, from an earlier run; used before their gradients show it.
    """

    def __init__(self, model: nn.Module, responses: Responses, limit: int | None = None) -> None:
        self.roles: dict[Layer, Role] = {}
        self.due: set[nn.Module] = set()
        self.uninitialized: set[Layer] = set()
        self.readings: dict[Layer, Reading] = {}
        self.heads: dict[Layer, bool] = {}
        self._responses = responses
        self._limit = limit
        self._pass = Pass()
        self._unmasked: set[Layer] = set()  # layers with a warning that a mask does not fit
        self._layers: dict[nn.Module, list[Layer]] = {}
        self._is_compiled, self._hook = is_compiled(model), inner_hook(model)
        self._operations = Operations(self._layers, self._wanted, self._observe, hook=self._hook)
        self._all_known = True
        self._tables: list[EmbeddingLayer] = []
        self._samplers: dict[Layer, Sampler] = {}
        self._active: dict[Layer, Sampler] = {}  # samplers with held or counted samples since the last step
        self._new: dict[Layer, Role] = {}  # roles that `resolve` has not returned yet
        self._missed: set[Layer] = set()  # layers that the last traced pass did not reach
        self._outputs: dict[Layer, Role] = {}  # output layers whose gradients have yet to show how they are scored
        self._unresolved: list[Batch] = []
        self._handles: list[RemovableHandle] = []
        self._entries = Entries(model, self._enter, self._leave, self._enter_missed)
        self.model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """Return the model, the layers and what is known of them; hooks and samples stay."""
        model = self.model()
        if model is None:
            raise TypeError("the model is gone, so that its observer cannot be copied or pickled")
        known = {name: getattr(self, name) for name in _KNOWLEDGE}
        return {"made": (model, self._responses, self._limit), "layers": list(self._samplers), "known": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Observe the copied model, with the same knowledge."""
        self.__init__(*state["made"])  # type: ignore[misc]  # hooks are made anew
        self.add(state["layers"])
        vars(self).update(state["known"])
        self._look_again()
        if not self._unknown():
            self._entries.settle(set())

    def add(self, layers: Sequence[Layer]) -> None:
        """Observe additional layers."""
        for layer in layers:
            module = layer.module
            if module not in self._layers:
                self._layers[module] = []
                self.due.add(module)
                if layer.operation and not isinstance(layer, EmbeddingLayer):
                    self._handles += self._operations.watch(module)
                else:  # before the hook that ends the trace, in case the model itself is the layer
                    seer = self._hook(self._seer(module), trains=True)
                    self._handles.append(module.register_forward_hook(seer, with_kwargs=True, prepend=True))
            if layer.random and not any(other.random for other in self._layers[module]):
                self._handles.append(module.register_forward_pre_hook(self._hook(self._remember, trains=True)))
            self._layers[module].append(layer)
            self._samplers[layer] = self._sampler(layer)
            if isinstance(layer, EmbeddingLayer):
                self._tables.append(layer)
        self._look_again()

    def _sampler(self, layer: Layer) -> Sampler:
        return Streamed(layer) if self._limit is None or not layer.sampled else Reserved(layer, self._limit)

    def resolve(self) -> dict[Layer, Role]:
        """Return new roles since the last call, also for layers that ran outside the model's own forward pass."""
        if self._unresolved:
            # Gradients flow from the last layer to the first. A layer that was refused since has no samples.
            batches = [batch for batch in self._unresolved[::-1] if batch.layer in self._samplers]
            self._unresolved = []
            layers = list(dict.fromkeys(batch.layer for batch in batches if batch.layer not in self.roles))
            named = ", ".join(layer.name for layer in layers if layer.followed)
            if named:
                self._warn(f"{named} ran outside the model's own forward pass, so that the activation is not known")
            self._conclude(layers, Trace())
            for batch in batches:
                self._active[batch.layer] = self._samplers[batch.layer]
                self._samplers[batch.layer].add(batch)
        new, self._new = self._new, {}
        return new

    def take(self) -> dict[Layer, Rows | Statistics]:
        """Return the samples since the last call, as rows or as statistics, and start again."""
        taken = {
            layer: content
            for layer, sampler in list(self._active.items())
            if layer in self.readings and (content := sampler.result(self.readings[layer])) is not None
        }
        self.drop()
        return taken

    @property
    def has_seen(self) -> bool:
        """Whether a pass that trains has reached any layer."""
        return bool(self.roles or self._outputs or self._missed or self._unresolved)

    @property
    def waiting(self) -> bool:
        """Whether `take` has anything to return."""
        return bool(self._unresolved) or any(sampler.counted for sampler in self._active.values())

    def drop(self) -> None:
        """Discard the samples whose gradients have flowed back since the last step."""
        self._unresolved.clear()
        for sampler in list(self._active.values()):
            sampler.clear()
        self._active.clear()

    def explains(self, layer: Layer) -> bool:
        """Return whether the reason for a missing metric is known: the layer is refused, or its gradients were 0."""
        role = self.roles.get(layer)
        return layer in self._outputs or (role is not None and role.refused is not None)

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Exclude positions from the statistics of forward passes inside this context.

        Args:
            mask: True for positions that count.

        Yields:
            Nothing.

        Raises:
            TypeError: if the mask is not a boolean tensor.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be boolean, got {found}: write mask.bool()")
        own = self._pass
        before = own.mask, own.masking
        own.mask, own.masking = mask, []
        try:
            yield
        finally:
            applied, (own.mask, own.masking) = own.masking, before
        if applied and not any(applied) and not self._unmasked:
            self._unmasked.update(self._samplers)
            warnings.warn(f"the mask {list(mask.shape)} was applied to no layer", messages.MaskWarning, stacklevel=4)

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._entries.close()
        self._pass.end()
        self.drop()

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Save the generator states before a call whose random numbers will be replayed."""
        if self._wanted(module):
            device = next(module.parameters()).device
            cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self._pass.random_states[module] = torch.get_rng_state(), cuda

    def _wanted(self, module: nn.Module) -> bool:
        """Return whether a call of this module is needed for statistics or roles."""
        if self._all_known and module not in self.due and not self.uninitialized:
            return False
        return any(
            (self.is_due(layer) or layer not in self.roles) and (layer.is_trained or not layer.operation)
            for layer in self._layers[module]
        )

    def is_due(self, layer: Layer) -> bool:
        """Return whether a layer's statistics are due."""
        return layer.module in self.due or layer in self.uninitialized

    def _seer(self, module: nn.Module) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._wanted(module):
                return
            call = Call(args, kwargs, output, self._pass.random_states.pop(module, None))
            for layer in self._layers[module]:
                if not layer.operation:
                    self._observe(layer, call, layer.output(output))

        return see

    def _observe(self, layer: Layer, call: Call, z: Tensor | None) -> None:
        if z is not None and (self.is_due(layer) or layer not in self.roles) and counts(layer, z):
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._see(layer, call, z)

    def _see(self, layer: Layer, call: Call, z: Tensor) -> None:
        traced = layer in self.roles or layer in self._outputs
        own = self._pass
        if not traced and own.model is not None and own.trace is None:
            self._missed.discard(layer)  # trace the next pass
            return
        if not layer.sampled and isinstance(self._samplers[layer], Reserved):  # it has turned out to be a table
            self._samplers[layer] = self._sampler(layer)
        sampler, due = self._samplers[layer], self.is_due(layer)
        sampling = sampler.sampling(own.mask)
        rows = layer.rows(call, sampling)
        if own.mask is not None:
            self._note_mask(layer, own.mask, sampling)
        self._active[layer] = sampler
        batch = sampler.hold(rows, sampling, self.readings.get(layer), due=due)
        if own.trace is not None and not traced:
            own.ran[layer] = None
            if layer.followed:
                own.trace.show(layer, call, z)
        masked, logits = own.mask is not None, None if layer in self.roles else z.detach()

        def count(gradient: Tensor) -> None:
            if self._samplers.get(layer) is sampler:  # otherwise it has been refused since, or is another layer
                self._count(batch, gradient, logits, masked=masked)

        z.register_hook(count)  # type: ignore[no-untyped-call]  # torch has no types here

    def _note_mask(self, layer: Layer, mask: Tensor, sampling: Sampling) -> None:
        """Note whether a mask was applied; warn once per layer if the mask was meant for it but did not fit."""
        self._pass.masking.append(sampling.masked)
        if sampling.unmasked is not None and layer not in self._unmasked:
            self._unmasked.add(layer)
            messages.tell_misfit(layer, mask, sampling.unmasked)

    def _count(self, batch: Batch, gradient: Tensor, outputs: Tensor | None, *, masked: bool) -> None:
        """Count a batch after its gradients have flowed back, once; the outputs show how they are scored."""
        layer = batch.layer
        if outputs is not None and layer in self._outputs and bool(torch.isfinite(gradient).all()):
            if not bool(gradient.any()):
                return  # not informative
            if not masked:
                messages.tell_unscored(layer, gradient)
            self._resolve_head(layer, is_softmax_gradient(gradient, outputs))
        if layer in self.roles:
            self._active[layer] = self._samplers[layer]
            self._samplers[layer].add(batch)
        elif layer not in self._outputs:
            self._unresolved.append(batch)

    def _resolve_head(self, layer: Layer, is_head: bool) -> None:
        role = self._outputs.pop(layer)
        self._learn({layer: replace(role, is_head=is_head)})

    def _learn(self, roles: Mapping[Layer, Role]) -> None:
        self.roles.update(roles)
        self._new.update(roles)
        self._look_again()

    def _look_again(self) -> None:
        """Find out whether the roles of all layers are known."""
        self._all_known = self._samplers.keys() <= self.roles.keys()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass.is_inside(model, self._operations.abandon):
            return  # a part of the module that was called
        observes = torch.is_grad_enabled()
        if observes and self._is_compiled:
            observes = bool(self.due or self._unknown() - self._missed)
            if observes:
                self._pass.run_eagerly()
        inputs = [*args, *kwargs.values()]
        if model is not self.model():  # what other parts have computed is not raw
            inputs = [each for each in inputs if not (isinstance(each, Tensor) and is_computed(each))]
        self._pass.model, self._pass.inputs = model, inputs
        if not observes:
            return
        if not self._all_known and self._unknown() - self._missed:
            self._pass.start_trace(self._samplers, self._responses)
        self._watch_tables()
        if self._pass.trace is None and model in self._layers:
            self._enter_missed(model, args, kwargs)

    def _watch_tables(self) -> None:
        """Watch the tables of which the pass may show that they are heads, or has samples that are needed."""
        if self._tables:
            wanted = [each for each in self._tables if self._may_score(each)]
            self._pass.start_tables(wanted, self._observe, self._begin)

    def _may_score(self, table: EmbeddingLayer) -> bool:
        """Return whether the pass may show that a table is a head, or has samples of a head that are needed."""
        if not table.settled:
            return self._pass.trace is not None
        return table.is_linear and table in self._samplers and table.is_trained and self._wanted(table.module)

    def _begin(self, table: Layer) -> None:
        """Forget what a table has looked up, since it is a head."""
        for known in (self.roles, self._new, self._active, self._pass.ran):
            known.pop(table, None)
        self._look_again()
        self._samplers[table] = self._sampler(table)
        self._unresolved = [batch for batch in self._unresolved if batch.layer is not table]

    def _enter_missed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the rest of the pass in which a layer runs that no traced pass has reached."""
        if not self._unknown().isdisjoint(self._layers[module]) and (
            trace := self._pass.start_trace(self._samplers, self._responses)
        ):
            self._watch_tables()
            trace.enter(module, args, kwargs)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if module is not self._pass.model:
            return
        error = sys.exc_info()[1] if output is None else None
        trace, ran = self._pass.end(error)
        missed = self._operations.missed()
        if trace is None or error is not None:
            return
        ran += [layer for layer in trace.hidden if layer in self._samplers and layer.is_trained and layer not in ran]
        self._refuse(trace, missed)
        if ran:
            self._conclude([layer for layer in ran if layer not in self.roles], trace)
            self._missed = self._unknown()
            self._entries.settle({layer.module for layer in self._missed})

    def _unknown(self) -> set[Layer]:
        """Return the trained layers whose role is not known yet."""
        return {
            layer for layer in self._samplers if layer not in self.roles and layer.is_trained
        } - self._outputs.keys()

    def _refuse(self, trace: Trace, missed: Mapping[Layer, Role]) -> None:
        """Drop the layers that cannot have a metric after all, and warn."""
        new = self._samplers.keys() - self.roles.keys()
        tied = roles_of(trace, [layer for layer in trace.misused if layer in new])
        unseen = [layer for layer in missed if layer in new - self._outputs.keys() - tied.keys() and layer.is_trained]
        refused = {**tied, **{layer: missed[layer] for layer in unseen}}
        for layer in refused:
            self._layers[layer.module].remove(layer)
            self._outputs.pop(layer, None)
            del self._samplers[layer]
            self._active.pop(layer, None)
        self._learn(refused)
        matrices = [layer for layer in unseen if not isinstance(layer, SpreadOperation)]  # others are small
        told = [layer for layer in matrices if not is_inside(layer, self._layers[layer.module])]
        for kind, layers in ((messages.TiedWarning, tied), (messages.UncoveredWarning, told)):
            messages.tell_refused({layer: refused[layer].refused or "" for layer in layers}, kind)

    def _conclude(self, layers: Sequence[Layer], trace: Trace) -> None:
        """Fix the roles of the layers that ran, and warn about unknown activations."""
        for layer, role in roles_of(trace, layers).items():
            if needs_gradient(trace, layer, role):
                self._outputs[layer] = role
                if layer in self.heads or is_recomputed():  # the loss has seen what follows
                    self._resolve_head(layer, self.heads.get(layer, False))
            else:
                self._learn({layer: role})
        strange = {layer.name: consumers for layer in layers if (consumers := trace.takers.unresolved(layer))}
        if strange:
            named = "; ".join(f"{name} feeds {', '.join(consumers)}" for name, consumers in strange.items())
            self._warn(f"the activation is not known: {named}")

    def _warn(self, message: str) -> None:
        warnings.warn(f"linear response for some layers: {message}", messages.ResponseWarning, stacklevel=3)


_KNOWLEDGE = ("roles", "due", "uninitialized", "readings", "heads", "_new", "_missed", "_outputs")
