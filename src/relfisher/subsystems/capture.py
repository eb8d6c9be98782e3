"""Forward hooks that gather each layer's batch metric, on the steps where one is due and on no others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relfisher.structures import Structure
from relfisher.subsystems.discover import ActivationWatch
from relfisher.subsystems.linear import LinearSubsystem

__all__ = ["Capture", "Gathered", "ResponseWarning"]


class ResponseWarning(UserWarning):
    """The activation that follows a layer could not be told, so that the layer has the linear response."""


@dataclass
class Gathered:
    """A layer's metric summed over the samples of the forward passes since the last step."""

    total: Tensor
    samples: int


class Capture:
    """Watches the layers of a model in its training forward passes.

    Until `keep` is called the layers' samples are held as they are, since their responses, and so their structures,
    are not known yet: the first forward pass of the whole model tells them to `discover`. From then on each forward
    pass of a layer adds to its pending metric while `due` is True, and does nothing otherwise.

    Args:
        model: the module whose forward pass tells the responses.
        layers: its subsystems.
    """

    def __init__(self, model: nn.Module, layers: list[LinearSubsystem]) -> None:
        self.due = True
        self._structures: Mapping[str, Structure] | None = None
        self._watch: ActivationWatch | None = None
        self._watched: ActivationWatch | None = None
        self._held: list[tuple[LinearSubsystem, Tensor, Tensor]] = []
        self._pending: dict[str, Gathered] = {}
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter),
            *(layer.module.register_forward_hook(self._hook(layer)) for layer in layers),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def discovered(self) -> bool:
        """Whether the structures are known."""
        return self._structures is not None

    def discover(self) -> list[LinearSubsystem]:
        """Fix the responses of the layers that were reached, and say which activations could not be told.

        Returns:
            The layers, in the order of the forward pass.
        """
        reached = list(dict.fromkeys(layer for layer, _, _ in self._held))
        watched = self._watched
        if watched is None:
            if reached:
                warnings.warn("the layers ran outside the model's own forward pass, so that their activations are not "
                              "known: linear response for all", ResponseWarning, 2)  # fmt: skip
            return reached
        for layer in reached:
            layer.response = watched.response(layer.name)
        untold = {layer.name: takers for layer in reached if (takers := watched.untold(layer.name))}
        if untold:
            named = "; ".join(f"{name} feeds {', '.join(takers)}" for name, takers in untold.items())
            warnings.warn(f"linear response for layers whose activation is not known: {named}", ResponseWarning, 2)
        return reached

    def keep(self, structures: Mapping[str, Structure]) -> None:
        """Gather in these structures, by layer name, from now on, and what was held so far."""
        self._structures = structures
        held, self._held = self._held, []
        for layer, augmented, z in held if self.due else ():
            self._add(layer, structures[layer.name], augmented, z)

    def take(self) -> dict[str, Gathered]:
        """Return what was gathered since the last call, by layer name, and start anew."""
        pending, self._pending = self._pending, {}
        return pending

    def drop(self) -> None:
        """Forget the samples since the last step."""
        self._held.clear()
        self._pending.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.drop()

    def _hook(self, layer: LinearSubsystem) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
            if (self.due or not self.discovered) and module.training and torch.is_grad_enabled():
                self._see(layer, args[0], z)

        return hook

    @torch.no_grad()
    def _see(self, layer: LinearSubsystem, x: Tensor, z: Tensor) -> None:
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        augmented = layer.samples(x.detach()).to(dtype)
        rows = z.detach().reshape(-1, layer.out).to(dtype)
        if self._structures is None:
            # An in-place activation will overwrite z before the response is known.
            self._held.append((layer, augmented, rows.clone()))
            if self._watch is not None:
                self._watch.show(layer.name, z)
        elif layer.name in self._structures:
            self._add(layer, self._structures[layer.name], augmented, rows)

    def _add(self, layer: LinearSubsystem, structure: Structure, augmented: Tensor, z: Tensor) -> None:
        total = structure.gather(augmented, z, layer.response)
        entry = self._pending.get(layer.name)
        if entry is None:
            self._pending[layer.name] = Gathered(total, augmented.shape[0])
        else:
            entry.total.add_(total)
            entry.samples += augmented.shape[0]

    def _enter(self, module: nn.Module, args: object) -> None:
        unseen = self._structures is None and self._watched is None and self._watch is None
        if unseen and module.training and torch.is_grad_enabled():
            self._watch = ActivationWatch()
            self._watch.__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        watch.forget()
        if output is None:  # the forward pass raised
            self._held.clear()
        else:
            self._watched = watch
