"""Texts that come with packages: the standard library in characters, SciPy's docstrings in subwords."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import scipy
import torch
from torch import Tensor

from relfisher.studies.data import DataError

__all__ = ["ALPHABET", "SUBWORDS", "characters", "subwords"]

ALPHABET = 128
SUBWORDS = 1024
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


def characters() -> Tensor:
    """Return the source as integers below `ALPHABET`, which depend on the Python version."""
    return torch.frombuffer(bytearray(source()), dtype=torch.uint8).long()


@lru_cache(maxsize=1)
def subwords() -> Tensor:
    """Return the docstrings of SciPy's modules, classes and functions, the first `BYTES`, as integers below `SUBWORDS`.

    The subwords are those of a byte pair encoding (Sennrich et al. 2016) of the same text.

    Raises:
        DataError: if the package tokenizers is not installed.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        message = "subwords need the package tokenizers, pip install 'relfisher[bench]'"
        raise DataError(message) from error
    root, documentation = Path(scipy.__file__).parent, ""
    for path in sorted(root.rglob("*.py")):
        if len(documentation) < BYTES and LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            documentation += "".join(f"{each}\n\n" for each in _docstrings(path))
    encoding = ByteLevelBPETokenizer()
    encoding.train_from_iterator(documentation.splitlines(keepends=True), SUBWORDS, show_progress=False)
    return torch.tensor(encoding.encode(documentation).ids)


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
