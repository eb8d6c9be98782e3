"""The layers between torch modules and metrics: which parameters form a layer, and what its samples are."""

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.chart import Chart, Computed, Leaf, Recorded
from relfisher.layers.discover import Discovery, check_kinds, discover, keepers, layers_of, plain_name, register_layer
from relfisher.layers.embedding import EmbeddingLayer
from relfisher.layers.linear import LinearLayer, LinearOperation, column, own_parameters, whole
from relfisher.layers.samples import Rows, Sampling
from relfisher.layers.spread import SpreadOperation, is_spread, settle_as_spread
from relfisher.layers.table import is_table, settle_as_table

__all__ = [
    "Call",
    "Chart",
    "Computed",
    "Discovery",
    "EmbeddingLayer",
    "Kinds",
    "Layer",
    "Leaf",
    "LinearLayer",
    "LinearOperation",
    "Part",
    "Recorded",
    "Rows",
    "Sampling",
    "SpreadOperation",
    "check_kinds",
    "column",
    "discover",
    "is_spread",
    "is_table",
    "keepers",
    "layers_of",
    "own_parameters",
    "plain_name",
    "register_layer",
    "settle_as_spread",
    "settle_as_table",
    "whole",
]
