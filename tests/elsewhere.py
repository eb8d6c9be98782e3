"""A device that is not the CPU, without any hardware: what runs on it runs on a CPU, and must say where it is.

Its tensors hold those of a CPU. An operation that takes tensors of both devices raises, as on a GPU, but for copies,
indices, and tensors of one number. A read of a number by the host is counted.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

__all__ = ["NAME", "Counter", "available"]

NAME = "elsewhere"
BETWEEN = (aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default)


class Counter:
    """Counts the numbers that the host has read."""

    reads = 0


class There(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, here):
        form = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, here.size(), **form, device=torch.device(NAME, 0))
        made.here = here
        return made

    def __repr__(self):
        return f"{self.here!r} {NAME}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _here(value):
    return value.here if isinstance(value, There) else value


def _there(value):
    return There(value) if isinstance(value, torch.Tensor) else value


def _run(func, args, kwargs):
    """Run an operation on the CPU, and return what is on the device there."""
    mixed = [each for each in pytree.tree_leaves((args, kwargs)) if type(each) is torch.Tensor and each.ndim]
    if mixed and func not in BETWEEN:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {len(mixed)} of the CPU")
    Counter.reads += func is aten._local_scalar_dense.default
    own_args, own_kwargs = pytree.tree_map(_here, (args, kwargs))
    if "device" in own_kwargs:
        own_kwargs["device"] = torch.device("cpu")
    result = FUSED.get(func, func)(*own_args, **own_kwargs)
    if torch.device(kwargs.get("device") or NAME).type == "cpu":
        return result
    if func is aten.copy_.default and not isinstance(args[0], There):
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map(_there, result))


def _made(func, *args, **kwargs):
    """Run an operation that takes no tensor, or a tensor of the CPU, and makes one of the device."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device(NAME, 0)
    return _run(func, args, kwargs)


def _lstm(given, kept, cell, *biases):
    i, f, g, o = sum(biases, given + kept).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * cell + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], -1)


def _lstm_backward(d_hidden, d_cell, cell, new, gates, has_bias):
    i, f, g, o = gates.chunk(4, -1)
    bent = new.tanh()
    d_hidden = torch.zeros_like(new) if d_hidden is None else d_hidden
    d_new = d_hidden * o * (1 - bent**2) + (0 if d_cell is None else d_cell)
    parts = d_new * g * i * (1 - i), d_new * cell * f * (1 - f), d_new * i * (1 - g**2), d_hidden * bent * o * (1 - o)
    d_gates = torch.cat(parts, -1)
    return d_gates, d_new * f, d_gates.sum(0) if has_bias else None


def _gru(given, kept, hidden, *biases):
    if biases:
        given, kept = given + biases[0], kept + biases[1]
    (r, z, n), (r_kept, z_kept, n_kept) = given.chunk(3, -1), kept.chunk(3, -1)
    r, z = (r + r_kept).sigmoid(), (z + z_kept).sigmoid()
    n = (n + r * n_kept).tanh()
    return n + z * (hidden - n), torch.cat([r, z, n, hidden, n_kept], -1)


def _gru_backward(d_hidden, kept, has_bias):
    r, z, n, hidden, n_kept = kept.chunk(5, -1)
    d_z, d_n = d_hidden * (hidden - n) * z * (1 - z), d_hidden * (1 - z) * (1 - n**2)
    d_r = d_n * n_kept * r * (1 - r)
    sides = torch.cat([d_r, d_z, d_n], -1), torch.cat([d_r, d_z, d_n * r], -1)
    return *sides, d_hidden * z, *(side.sum(0) if has_bias else None for side in sides)


# Recurrent cells that torch fuses on devices, and does not have on a CPU.
FUSED = {
    aten._thnn_fused_lstm_cell.default: _lstm,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_backward,
    aten._thnn_fused_gru_cell.default: _gru,
    aten._thnn_fused_gru_cell_backward.default: _gru_backward,
}


class _Module:
    """What torch asks of a device."""

    def is_available(self):
        return False  # no other test takes it for a device of this machine

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        """Do nothing: the numbers are drawn by the CPU."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=0):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=0):
        torch.set_rng_state(state)

    def device_count(self):
        return 1

    def current_device(self):
        return 0


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return False

    def has_primary_context(self, _):
        return True

    def is_built(self):
        return True


_LIBRARY = torch.library.Library("_", "IMPL")


def available():
    """Return the name of the device, which is there from then on."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
        _LIBRARY.fallback(_made, "PrivateUse1")
    return NAME
