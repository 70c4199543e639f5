"""Losses of routers, and of a mixture as a whole."""

from keras_moe.losses.balance import importance, load, load_balancing, router_z
from keras_moe.losses.mixture import MixtureOfExpertsLoss, blend, pack, responsibilities, unpack

__all__ = [
    "MixtureOfExpertsLoss",
    "blend",
    "importance",
    "load",
    "load_balancing",
    "pack",
    "responsibilities",
    "router_z",
    "unpack",
]
