"""Images without meaning and short texts, for tests that only need something to train on."""

import pytest
import torch

from relfisher.studies import text, workloads
from relfisher.studies.data import Dataset


@pytest.fixture
def noise(monkeypatch):
    """The images of every data set that the benchmarks load are noise; their texts are short."""
    images, labels = torch.rand(300, 784, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 10
    data = Dataset("noise", images[:260], labels[:260], images[260:], labels[260:])
    monkeypatch.setattr(workloads, "load", lambda _: data)
    monkeypatch.setattr(text, "BYTES", 300_000)
    workloads.samples.cache_clear()
    yield
    workloads.samples.cache_clear()
