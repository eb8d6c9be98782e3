"""The IDX file format of MNIST and related data sets: a big-endian header, then one unsigned byte per value.

The header consists of two zero bytes, the type code (8 for unsigned bytes), the number of axes, and the length of each
axis as a 32-bit integer.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["IdxError", "read_idx"]

UNSIGNED_BYTE = 8


class IdxError(ValueError):
    """A file is not the expected IDX file; the message is one line that names the file."""


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, compressed with gzip if its name ends in `.gz`.

    Args:
        path: the path of the file.
        axes: the required number of axes: 1 for labels, 3 for images.

    Returns:
        The values, in the shape given by the header.

    Raises:
        IdxError: if the file is unreadable, truncated or not gzip, or has a wrong magic number or length.
    """
    content = _content(path)
    header = 4 + 4 * axes
    magic = bytes([0, 0, UNSIGNED_BYTE, axes])
    if len(content) < header:
        raise IdxError(f"{path} is truncated: {len(content)} bytes, the header alone has {header}")
    if content[:4] != magic:
        raise IdxError(f"{path} starts with the magic number 0x{content[:4].hex()}, allowed is 0x{magic.hex()}")
    shape = struct.unpack(f">{axes}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        state = "is truncated" if len(content) < expected else "is too long"
        raise IdxError(f"{path} {state}: {len(content)} bytes, the header announces {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except gzip.BadGzipFile as error:
        raise IdxError(f"{path} is not a gzip file, allowed are gzip files named .gz and plain IDX files") from error
    except (EOFError, zlib.error) as error:
        raise IdxError(f"{path} is truncated or damaged: {error}") from error
    except OSError as error:
        raise IdxError(f"{path} cannot be read: {error.strerror}") from error
