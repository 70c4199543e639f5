"""Routers: they decide which expert sees which token, and return that decision as plain tensors."""

from keras_moe.routing.base import Router, Routing, seat_choices
from keras_moe.routing.expert_choice import ExpertChoiceRouter
from keras_moe.routing.hashing import HashRouter
from keras_moe.routing.loss_free import LossFreeRouter
from keras_moe.routing.noisy import NoisyTopKRouter
from keras_moe.routing.softmax import SoftmaxRouter
from keras_moe.routing.strict import StrictlyBalancedRouter
from keras_moe.routing.token_choice import SwitchRouter, TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "HashRouter",
    "LossFreeRouter",
    "NoisyTopKRouter",
    "Router",
    "Routing",
    "SoftmaxRouter",
    "StrictlyBalancedRouter",
    "SwitchRouter",
    "TopKRouter",
    "seat_choices",
]
