import functools
import gzip
import hashlib
import http.server
import struct
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from relfisher.cli import main
from relfisher.studies import data
from relfisher.studies.data import DOWNLOADS, DataError, fetch, load
from relfisher.studies.idx import IdxError, read_idx


def idx_bytes(values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def write_idx_directory(directory, images, labels, suffix=".gz"):
    for name, values in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        content = idx_bytes(values)
        (directory / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)


def digits(count, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return images, generator.integers(0, 10, count).astype(np.uint8)


@given(
    values=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)),
    compressed=st.booleans(),
)
def test_idx_reads_back_what_was_written(values, compressed):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / ("values.gz" if compressed else "values")
        path.write_bytes(gzip.compress(idx_bytes(values)) if compressed else idx_bytes(values))
        np.testing.assert_array_equal(read_idx(path, values.ndim), values)


@given(content=st.binary(max_size=64), name=st.sampled_from(["values", "values.gz"]))
def test_any_other_bytes_are_an_idx_error(content, name):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        with pytest.raises(IdxError, match="values"):
            read_idx(path, 3)


@given(values=arrays.arrays(np.uint8, (3, 4)), data=st.data())
def test_a_truncated_idx_file_is_an_idx_error(values, data):
    whole = idx_bytes(values)
    kept = data.draw(st.integers(0, len(whole) - 1))
    with tempfile.TemporaryDirectory() as directory:
        plain, compressed = Path(directory) / "values", Path(directory) / "values.gz"
        plain.write_bytes(whole[:kept])
        compressed.write_bytes(gzip.compress(whole)[: max(1, kept // 2)])
        for path in (plain, compressed):
            with pytest.raises(IdxError):
                read_idx(path, 2)


def test_mnist5k_is_split_by_class_and_the_same_every_time():
    digits5k = load("mnist5k")
    assert digits5k.train_images.shape == (4500, 784)
    assert digits5k.train_images.dtype == torch.float32
    assert digits5k.train_labels.dtype == torch.int64
    assert (digits5k.train_images.min(), digits5k.train_images.max()) == (0, 1)
    assert digits5k.train_labels.bincount().tolist() == [450] * 10
    assert digits5k.validation_labels.bincount().tolist() == [50] * 10
    assert digits5k.fingerprint() == "d5e5551dad158c3b"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_first_twelfth_of_an_idx_directory_is_for_validation(tmp_path, suffix):
    images, labels = digits(120)
    write_idx_directory(tmp_path, images, labels, suffix)
    loaded = load(str(tmp_path))
    assert loaded.name == tmp_path.name
    np.testing.assert_array_equal(loaded.validation_labels, labels[:10])
    np.testing.assert_array_equal(loaded.train_labels, labels[10:])
    np.testing.assert_allclose(loaded.train_images, images[10:].reshape(110, 784) / 255, rtol=1e-6)


def test_the_fingerprint_sees_one_changed_pixel(tmp_path):
    write_idx_directory(tmp_path, *digits(60))
    original = load(str(tmp_path))
    images = original.train_images.clone()
    images[7, 300] += 0.5
    assert replace(original, train_images=images).fingerprint() != original.fingerprint()


def test_an_installed_data_set_is_found_in_the_cache_and_a_missing_one_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFISHER_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    load.cache_clear()
    for name in DOWNLOADS:
        with pytest.raises(DataError, match=f"relfisher data fetch {name}"):
            load(name)
    (tmp_path / "mnist").mkdir()
    write_idx_directory(tmp_path / "mnist", *digits(60))
    assert load("mnist").name == "mnist"
    load.cache_clear()


def wrong_magic(directory):
    (directory / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((4, 4), np.uint8))))


def truncated(directory):
    path = directory / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-200])


def not_gzip(directory):
    (directory / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>")


DAMAGES = {
    "magic number 0x00000802, allowed is 0x00000801": wrong_magic,
    "truncated": truncated,
    "not a gzip file": not_gzip,
    "has no file train-labels-idx1-ubyte": lambda directory: (directory / "train-labels-idx1-ubyte.gz").unlink(),
    "120 images but 119 labels": lambda directory: write_idx_directory(directory, digits(120)[0], digits(119)[1]),
    "label 10, allowed are 0 to 9": lambda directory: write_idx_directory(
        directory, digits(120)[0], np.full(120, 10, np.uint8)
    ),
    "59 images, allowed are 60 or more": lambda directory: write_idx_directory(directory, *digits(59)),
    "28 x 27, allowed are 28 x 28": lambda directory: write_idx_directory(
        directory, digits(120)[0][:, :, :27], digits(120)[1]
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_directory_is_a_data_error_of_one_line(tmp_path, message):
    write_idx_directory(tmp_path, *digits(120))
    DAMAGES[message](tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server on this machine that publishes a small data set under the name of MNIST."""
    files, cache = tmp_path / "published", tmp_path / "cache"
    files.mkdir()
    write_idx_directory(files, *digits(60))
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (files / name).write_bytes(b"test")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.iterdir()}
    monkeypatch.setitem(DOWNLOADS, "mnist", replace(DOWNLOADS["mnist"], hashes=hashes))
    monkeypatch.setenv("RELFISHER_CACHE", str(cache))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", files
        server.shutdown()
        thread.join()
    load.cache_clear()


class Bar:
    def __init__(self):
        self.total = 0
        self.seen = 0

    def update(self, count):
        self.seen += count

    def reset(self):
        self.seen = 0

    def close(self):
        pass


def test_fetch_downloads_checks_and_keeps(published):
    url, files = published
    bar = Bar()
    directory = fetch("mnist", base_url=url, bar=bar)
    assert bar.seen > 0
    for path in files.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
        path.unlink()
    assert fetch("mnist", base_url=url) == directory
    assert len(load("mnist").train_labels) == 55


def test_the_command_line_fetches_with_a_progress_bar(published, monkeypatch, capsys, tmp_path):
    url, _ = published
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys, "argv", ["relfisher", "data", "fetch", "mnist", "--base-url", url])
    assert main() == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'cache' / 'mnist'}\n"
    assert captured.err.count("downloading") >= len(DOWNLOADS["mnist"].hashes)


def test_fetch_leaves_no_file_with_a_wrong_hash(published):
    url, files = published
    (files / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match="not the published file"):
        fetch("mnist", base_url=url)
    with pytest.raises(DataError, match="relfisher data fetch mnist"):
        load("mnist")


def test_fetch_says_what_the_server_answered(published):
    url, files = published
    (files / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be downloaded: status 404"):
        fetch("mnist", base_url=url)
    with pytest.raises(DataError, match="no answer"):
        fetch("mnist", base_url="http://127.0.0.1:9/")


def test_only_known_data_sets_are_fetched():
    with pytest.raises(DataError, match="allowed are mnist, fashion-mnist"):
        fetch("cifar")
