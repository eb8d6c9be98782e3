"""Images without meaning, for tests that only need something to train on."""

import pytest
import torch

from relfisher.studies import workloads
from relfisher.studies.data import Dataset


@pytest.fixture
def noise(monkeypatch):
    """The images of every data set that the benchmarks load are noise."""
    images, labels = torch.rand(300, 784, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 10
    data = Dataset("noise", images[:260], labels[:260], images[260:], labels[260:])
    monkeypatch.setattr(workloads, "load", lambda _: data)
    workloads.samples.cache_clear()
    yield
    workloads.samples.cache_clear()
