"""Mixture of experts for Keras 3, sparse in fact, on TensorFlow, JAX and PyTorch."""

from keras_moe import callbacks, losses, metrics
from keras_moe.experts import FeedForwardExperts, LayerExperts
from keras_moe.moe import MixtureOfExperts
from keras_moe.routing import (
    ExpertChoiceRouter,
    LossFreeRouter,
    NoisyTopKRouter,
    Router,
    Routing,
    SoftmaxRouter,
    SwitchRouter,
    TopKRouter,
)
from keras_moe.soft import SoftMoE

__version__ = "0.1.0"

__all__ = [
    "ExpertChoiceRouter",
    "FeedForwardExperts",
    "LayerExperts",
    "LossFreeRouter",
    "MixtureOfExperts",
    "NoisyTopKRouter",
    "Router",
    "Routing",
    "SoftMoE",
    "SoftmaxRouter",
    "SwitchRouter",
    "TopKRouter",
    "callbacks",
    "losses",
    "metrics",
]
