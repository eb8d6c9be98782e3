"""Where a program may enter a model: a call of the model itself, or of parts of it from methods or from outside."""

from __future__ import annotations

from collections.abc import Callable, Set

from torch import nn
from torch.utils.hooks import RemovableHandle

from relfisher.observe.hooks import Hook, inner_hook, is_compiled

__all__ = ["Entries", "roots_of"]


class Entries:
    """The hooks of a model's calls, and of those of its parts as long as modules are missed.

    Args:
        model: the model, or a container such as ModuleList, whose modules are then called themselves.
        enter: called before each call with the module, its arguments and keyword arguments.
        leave: called after each call with the module, its arguments and its output, or None after an error.
        found: called like `enter` before each call of a missed module.
    """

    def __init__(
        self, model: nn.Module, enter: Callable[..., None], leave: Callable[..., None], found: Callable[..., None]
    ) -> None:
        self._enter, self._leave, self._found = enter, leave, found
        self._inner = inner_hook(model)
        roots = roots_of(model)
        self._roots = self._hooked(roots, Hook)
        # The model that was compiled may be called as it is.
        self._roots += self._hooked(
            [child for root in roots if is_compiled(root) for child in root.children()], self._inner
        )
        self._parts = self._hooked(_parts(roots), Hook)
        self._missed: dict[nn.Module, RemovableHandle] = {}

    def settle(self, missed: Set[nn.Module]) -> None:
        """Hook the calls of the missed modules, and of no others; without any, remove the hooks of the parts."""
        for module in self._missed.keys() - missed:
            self._missed.pop(module).remove()
        for module in missed - self._missed.keys():
            hook = self._inner(self._found)  # before what watches the module, which ends earlier
            self._missed[module] = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        while self._parts and not missed:
            self._parts.pop().remove()

    def close(self) -> None:
        """Remove all hooks."""
        self.settle(set())
        while self._roots:
            self._roots.pop().remove()

    def _hooked(self, modules: list[nn.Module], hook: type[Hook]) -> list[RemovableHandle]:
        handles = []
        for module in modules:
            handles.append(module.register_forward_pre_hook(hook(self._enter), with_kwargs=True))
            handles.append(module.register_forward_hook(hook(self._leave), always_call=True))
        return handles


def roots_of(model: nn.Module) -> list[nn.Module]:
    """Return a model, or what is in it if it is a container such as ModuleList, which cannot be called."""
    if _is_callable(model):
        return [model]
    return [root for child in model.children() for root in roots_of(child)]


def _parts(roots: list[nn.Module]) -> list[nn.Module]:
    """Return the modules inside that have parts themselves; a compiled graph is not entered in the middle."""
    parts = dict.fromkeys(part for root in roots if not is_compiled(root) for part in root.modules())
    return [
        part for part in parts if part not in roots and _is_callable(part) and next(part.children(), None) is not None
    ]


def _is_callable(module: nn.Module) -> bool:
    return is_compiled(module) or getattr(type(module), "forward", None) is not nn.Module.forward
