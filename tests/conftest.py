"""jaxtyping and beartype check the shapes on every call that a test makes, at any depth, into the rooms of `SHAPED`."""

import os

import pytest
import torch
from hypothesis import Phase, settings
from jaxtyping import install_import_hook

# Annotations give shapes here. Checking all rooms would take twice the time; the types of the others are mypy's.
SHAPED = "autodiff distributions evaluation information layers logistic metric moments pullback responses structures"
install_import_hook([f"relfisher.{room}" for room in SHAPED.split()], "typechecker.checked")

# Without the phase that explains failures, which traces every line that a test runs.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile(
    "quick", deadline=None, max_examples=10, derandomize=bool(os.environ.get("CI")), phases=PHASES
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=100, derandomize=False)
settings.load_profile("quick")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed torch, so that what a test draws does not depend on the tests before it."""
    torch.manual_seed(0)
