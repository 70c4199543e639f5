"""What the backbones share: their config, and feed-forward layers, dense or sparse."""

from numbers import Integral

import keras

from keras_moe import FeedForwardExperts, MixtureOfExperts, Router
from keras_moe.routing.base import positive_integer
from zoo.layers import FeedForward


class Configured:
    """Base of the backbones: the arguments of the constructor are their attributes and config.

    KerasHub's `enable_lora(rank)` freezes all weights and adapts the queries and values of dense
    attention; Keras' `quantize("int8")` makes bytes of the dense layers' kernels. Experts and
    routers stay as they are, in both.
    """

    def keep(self, **arguments):
        """Keeps arguments; a router as `<name>_config`, or Keras would take it for a layer here."""
        self._kept = (*getattr(self, "_kept", ()), *arguments)
        for name, value in arguments.items():
            if name.endswith("router"):
                config = value and keras.saving.serialize_keras_object(value)
                setattr(self, f"{name}_config", config)
            elif name == "activation":
                self.activation = keras.activations.get(value)
            else:
                setattr(self, name, value)

    def get_config(self):
        config = super().get_config()
        for name in self._kept:
            if name.endswith("router"):
                config[name] = getattr(self, f"{name}_config")
            elif name == "activation":
                config[name] = keras.activations.serialize(self.activation)
            else:
                config[name] = getattr(self, name)
        return config

    @classmethod
    def from_config(cls, config):
        routers = {
            name: config[name] and keras.saving.deserialize_keras_object(config[name])
            for name in config
            if name.endswith("router")
        }
        return super().from_config({**config, **routers})


def sparse_numbers(name, blocks, num_layers):
    """Numbers, from 1, of the sparse blocks: those of the argument `name`, or every second."""
    if blocks is None:
        return tuple(range(2, num_layers + 1, 2))
    is_list = isinstance(blocks, (tuple, list))
    if not is_list or not all(isinstance(n, Integral) and 1 <= n <= num_layers for n in blocks):
        raise ValueError(
            f"`{name}` must be numbers from 1 to {num_layers}, in a list. "
            f"Received: {name}={blocks!r}"
        )
    return tuple(blocks)


def check_arguments(routers, dtype, **sizes):
    """Raises a ValueError unless a backbone can be made of them, as far as they do not depend.

    Args:
        routers: name -> router or `None`.
        dtype: dtype or dtype policy, `None` for Keras' own.
        **sizes: which must be positive integers.
    """
    for name, size in sizes.items():
        positive_integer(name, size)
    for name, router in routers.items():
        if router is not None and not isinstance(router, Router):
            raise ValueError(
                f"`{name}` must be a `keras_moe` router or None. Received: {name}={router!r}"
            )
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    if "float" not in (policy.compute_dtype or "float"):  # a map of policies has none
        raise ValueError(f"`dtype` must be one of floats. Received: dtype={dtype!r}")


def check_parts(task, backbone, preprocessor):
    """Raises a ValueError unless a task can be made of a backbone and a preprocessor.

    Args:
        task: class of the task.
        backbone: of which it must be the class's kind.
        preprocessor: whose tokenizer must not have more pieces than the backbone has rows; `None`
            if there is none.
    """
    if not isinstance(backbone, task.backbone_cls):
        raise ValueError(
            f"`backbone` of a `{task.__name__}` must be a `{task.backbone_cls.__name__}`. "
            f"Received: a {type(backbone).__name__}"
        )
    try:
        pieces = preprocessor.tokenizer.vocabulary_size() if preprocessor else 0
    except ValueError:  # Keras loads a tokenizer's files after the model
        return
    if pieces > backbone.vocabulary_size:
        raise ValueError(
            "`preprocessor` must have a tokenizer of at most the backbone's "
            f"{backbone.vocabulary_size} pieces. Received: one of {pieces}"
        )


def mixture(experts, router, group, dtype, name):
    """A `MixtureOfExperts` with its own copy of a router."""
    copy = type(router).from_config({**router.get_config(), "name": "router"})
    return MixtureOfExperts(experts, copy, group, dtype=dtype, name=name)


def feed_forward(
    router,
    *,
    num_experts,
    expert_dim,
    intermediate_dim,
    group,
    activation,
    gated,
    dropout,
    expert_dropout,
    expert_init_scale,
    dtype,
    name,
):
    """A `MixtureOfExperts` named `name`, or, without a router, a `FeedForward`."""
    if router is None or num_experts == 0:
        return FeedForward(
            intermediate_dim, activation, dropout, gated, dtype=dtype, name="feed_forward"
        )
    experts = FeedForwardExperts(
        num_experts,
        expert_dim or intermediate_dim,
        activation=activation,
        gated=gated,
        dropout=expert_dropout,
        init_scale=expert_init_scale,
        dtype=dtype,
        name="experts",
    )
    return mixture(experts, router, group, dtype, name)
