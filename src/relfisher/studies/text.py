"""A text that comes with every Python: the source of its standard library, as characters."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ALPHABET", "characters", "fingerprint"]

ALPHABET = 128
BYTES = 4 * 2**20
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@lru_cache(maxsize=1)
def source() -> bytes:
    """Return the standard library's modules in path order, up to `BYTES`, with "?" for non-ASCII characters."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    text = bytearray()
    for name in sorted(paths):
        if len(text) >= BYTES:
            break
        if not LEFT_OUT.intersection(name.split("/")):
            text += paths[name].read_bytes()
    return bytes(text[:BYTES]).decode("ascii", errors="replace").replace("\ufffd", "?").encode("ascii")


def fingerprint() -> str:
    """Return the SHA-256 of the text, which depends on the Python version."""
    return hashlib.sha256(source()).hexdigest()


def characters() -> Tensor:
    """Return the text as integers below `ALPHABET`."""
    return torch.frombuffer(bytearray(source()), dtype=torch.uint8).long()
