"""Losses of routers, and of a mixture as a whole."""

from keras_moe.losses.balance import (
    batchwise_threshold,
    hierarchical_importance,
    hierarchical_load,
    importance,
    load,
    load_balancing,
    router_z,
    sequence_balancing,
)
from keras_moe.losses.mixture import MixtureOfExpertsLoss, blend, pack, responsibilities, unpack

__all__ = [
    "MixtureOfExpertsLoss",
    "batchwise_threshold",
    "blend",
    "hierarchical_importance",
    "hierarchical_load",
    "importance",
    "load",
    "load_balancing",
    "pack",
    "responsibilities",
    "router_z",
    "sequence_balancing",
    "unpack",
]
