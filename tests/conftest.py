"""Shapes are checked by jaxtyping and beartype on every call the tests make into the library."""

import os

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("relfisher", "typechecker.checked")

settings.register_profile("relfisher", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.load_profile("relfisher")
torch.set_num_threads(1)
