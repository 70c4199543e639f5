"""Mixture of experts for Keras 3, sparse in fact, on TensorFlow, JAX and PyTorch."""

from keras_moe import callbacks, distribution, losses, metrics, optimizers, plots, surgery
from keras_moe.experts import FeedForwardExperts, LayerExperts, LinearExperts
from keras_moe.hierarchical import HierarchicalMoE, HierarchicalRouter
from keras_moe.moe import MixtureOfExperts
from keras_moe.reading import mixtures, routings
from keras_moe.routing import (
    ExpertChoiceRouter,
    HashRouter,
    LossFreeRouter,
    NoisyTopKRouter,
    Router,
    Routing,
    SoftmaxRouter,
    StrictlyBalancedRouter,
    SwitchRouter,
    TopKRouter,
)
from keras_moe.soft import SoftMoE

__version__ = "0.1.0"

__all__ = [
    "ExpertChoiceRouter",
    "FeedForwardExperts",
    "HashRouter",
    "HierarchicalMoE",
    "HierarchicalRouter",
    "LayerExperts",
    "LinearExperts",
    "LossFreeRouter",
    "MixtureOfExperts",
    "NoisyTopKRouter",
    "Router",
    "Routing",
    "SoftMoE",
    "SoftmaxRouter",
    "StrictlyBalancedRouter",
    "SwitchRouter",
    "TopKRouter",
    "callbacks",
    "distribution",
    "losses",
    "metrics",
    "mixtures",
    "optimizers",
    "plots",
    "routings",
    "surgery",
]
