"""Check how much memory is free before forming a dense matrix."""

from __future__ import annotations

import os

import torch

__all__ = ["available_bytes", "check_fits"]


def available_bytes(device: torch.device) -> int:
    """Return the free bytes of a device; for devices other than CPU and CUDA, those of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kilobytes * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(what: str, numbers: int, dtype: torch.dtype, device: torch.device, instead: str) -> None:
    """Raise ValueError unless a tensor takes at most half of the free memory.

    Args:
        what: a description of the tensor, for the message.
        numbers: the number of its entries.
        dtype: the dtype of its entries.
        device: the device that would hold it.
        instead: what to do instead, for the message.

    Raises:
        ValueError: if the tensor takes more; the message gives its size, the free memory and the alternative.
    """
    needed = numbers * dtype.itemsize
    free = available_bytes(device)
    if needed > free / 2:
        raise ValueError(
            f"{what} would take {needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB "
            f"that are free on {device}; {instead}"
        )
