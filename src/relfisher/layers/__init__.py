"""The layers between torch modules and metrics: which parameters form a layer, and what its samples are."""

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.discover import Discovery, check_kinds, discover, layers_of, plain_name, register_layer
from relfisher.layers.linear import LinearLayer, LinearOperation, column, whole
from relfisher.layers.samples import Rows, Sampling

__all__ = [
    "Call",
    "Discovery",
    "Kinds",
    "Layer",
    "LinearLayer",
    "LinearOperation",
    "Part",
    "Rows",
    "Sampling",
    "check_kinds",
    "column",
    "discover",
    "layers_of",
    "plain_name",
    "register_layer",
    "whole",
]
