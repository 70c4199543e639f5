"""The mixture-of-experts layer: router -> dispatch -> experts -> combine.

G groups, S tokens per group, T tokens in all, D width, R rows of slots, C slots per row.
"""

import contextlib
import contextvars
import math

import keras
from keras import ops

from keras_moe import metrics
from keras_moe.dispatch import combine, dispatch
from keras_moe.distribution.active import active, gathered, sharding
from keras_moe.ops import keeps_statistics
from keras_moe.routing import Router
from keras_moe.routing.base import dropping_nothing

_watched = contextvars.ContextVar("watched", default=None)


@contextlib.contextmanager
def watching():
    """Within, layers that are called keep neither losses nor statistics, but put their `Routing`.

    Yields:
        Dictionary, to be filled, from a layer's `id` to the `Routing` of its last call.
    """
    token = _watched.set({})
    try:
        yield _watched.get()
    finally:
        _watched.reset(token)


@keras.saving.register_keras_serializable(package="keras_moe")
class MixtureOfExperts(keras.layers.Layer):
    """Sends every token to a few experts and sums what they make of it.

    `y = sum_e weight_e(x) * expert_e(x)` over the experts that a token reaches: Shazeer et al. 2017
    (https://arxiv.org/abs/1701.06538), Eq. 1; Switch Transformers
    (https://arxiv.org/abs/2101.03961), Eq. 2.

    An expert gets the tokens that chose it (or that it chose), no others. A token that no expert
    serves comes out as exactly zero: put a residual connection around the layer.

    The router's losses are added with `add_loss` (in evaluation too, as Keras does with all such
    losses), and routing statistics are kept in two non-trainable weights for
    `keras_moe.callbacks.RoutingMetrics`; they are not saved.

    Example:

    ```python
    layer = keras_moe.MixtureOfExperts(
        keras_moe.FeedForwardExperts(num_experts=8, hidden_dim=1024),
        keras_moe.SwitchRouter(),
    )
    outputs = inputs + layer(inputs)  # [batch, length, dim]
    ```

    Fine-grained and shared experts, as in DeepSeekMoE (https://arxiv.org/abs/2401.06066): in place
    of `n` experts of hidden width `h`, `k` for each token, take `m * n` experts of width `h / m`,
    `m * k` for each token. These are as many weights and multiplications, and far more combinations
    of experts (section 3.1). `s` of them may serve every token and are not routed (section 3.2):
    `shared` then has the width `s * h / m`, and `m * n - s` experts are left for the router, which
    sends each token to `m * k - s`. For `n = 16`, `h = 1024`, `k = 2`, `m = 4` and `s = 1`:

    ```python
    layer = keras_moe.MixtureOfExperts(
        keras_moe.FeedForwardExperts(num_experts=63, hidden_dim=256, gated=True),
        keras_moe.TopKRouter(7, normalize=False),
        shared=keras_moe.FeedForwardExperts(1, 256, gated=True, name="shared"),
    )
    ```

    Args:
        experts: a bank of experts: `FeedForwardExperts`, `LayerExperts`, or any layer with
            `num_experts` that maps `[rows, slots, dim]` and `row_expert` to `[rows, slots, out]`.
        router: `SwitchRouter`, `TopKRouter`, `ExpertChoiceRouter` or another `Router`.
        group: the tokens that share a capacity, and among which experts choose. `"sequence"`: each
            sequence by itself, so that no sequence ever changes another's output. `"batch"`: all
            tokens of the batch. A number: that many tokens at a time, in order, the last group
            filled up with padding. An encoder routes better in large groups (a small group wastes
            the `min_capacity` slots of many experts); a decoder needs `"sequence"`.
        shared: a layer that is called on all inputs, and whose outputs are added to the experts'
            weighted sum: any Keras layer or model that keeps the inputs' shape but for the width,
            or a bank of experts, all of which then serve every token. Padding reaches it as zeros.
            `None`: there is none.

    Call arguments:
        inputs: `[batch, length, dim]` tensor, or `[tokens, dim]`, which is one group unless `group`
            is a number.
        mask: booleans, `inputs.shape[:-1]`; `False` for padding, which takes no slot, enters no
            loss and no statistic, and comes out as zero. Keras passes an upstream mask by itself.
        training: boolean; jitter, dropout and the training capacity only when `True`.
        token_ids: integers, `inputs.shape[:-1]`, for a router that hashes them (`HashRouter`); for
            no other.
        inputs_mask: the upstream mask, which Keras passes under this name when `token_ids` are
            given; `mask` comes first.

    Returns:
        Tensor shaped like `inputs`, but for the width of the experts' output.

    Raises:
        ValueError: if an argument is out of range, if the router does not fit the number of
            experts, if the inputs, the mask or the ids have another shape, or if ids are missing
            or given for nothing.
    """

    def __init__(self, experts, router, group="sequence", shared=None, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(router, Router):
            raise ValueError(f"`router` must be a `keras_moe` router. Received: router={router!r}")
        if not isinstance(experts, keras.Layer) or not hasattr(experts, "num_experts"):
            raise ValueError(
                "`experts` must be a layer with `num_experts`, such as `FeedForwardExperts` or "
                f"`LayerExperts`. Received: experts={experts!r}"
            )
        is_number = isinstance(group, int) and not isinstance(group, bool) and group >= 1
        if group not in ("sequence", "batch") and not is_number:
            raise ValueError(
                "`group` must be 'sequence', 'batch' or a positive number of tokens. "
                f"Received: group={group!r}"
            )
        if shared is not None and not isinstance(shared, keras.Layer):
            raise ValueError(f"`shared` must be a Keras layer or None. Received: shared={shared!r}")
        if shared is not None and shared.name in (experts.name, router.name):
            raise ValueError(
                "`shared` must have a name of its own, under which its weights are kept, such as "
                f"'shared'. Received: a layer named {shared.name!r}"
            )
        batched = getattr(experts, "implementation", None) == "batched"
        if batched and not router.one_row_per_expert:
            raise ValueError(
                "`experts` with implementation='batched' need a router with a capacity, in "
                f"training and in inference. Received: router={router!r}"
            )
        router.set_num_experts(experts.num_experts)
        self.experts = experts
        self.router = router
        self.group = group
        self.shared = shared
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) not in (2, 3) or input_shape[-1] is None:
            raise ValueError(
                "`inputs` must be [tokens, dim] or [batch, length, dim] with a known dim. "
                f"Received: inputs of shape {tuple(input_shape)}"
            )
        if not self.router.built:
            self.router.build((None, None, input_shape[-1]))
        if not self.experts.built:
            with sharding(self.experts, self.path, self.router):
                self.experts.build((None, None, input_shape[-1]))
        if self.shared is not None:
            self._build_shared(input_shape)
        self.statistics = [
            keras.Variable(  # `add_weight` has no synchronization
                "zeros",
                shape,
                "float32",
                trainable=False,
                autocast=False,
                synchronization="on_read",  # each replica of tf.distribute adds up its own
                aggregation="sum",
                name=name,
            )
            for name, shape in metrics.statistics_shapes(self.router.num_experts).items()
        ]

    def _build_shared(self, input_shape):
        is_bank = hasattr(self.shared, "num_experts")
        shape = (None, None, input_shape[-1]) if is_bank else input_shape
        if not self.shared.built:
            self.shared.build(shape)
        width = self.shared.compute_output_shape(shape)[-1]
        expected = self.compute_output_shape(input_shape)[-1]
        if width != expected:
            raise ValueError(
                "`shared` must have the experts' output width. "
                f"Received: shared of width {width} for experts of width {expected}"
            )

    def call(self, inputs, mask=None, training=False, token_ids=None, inputs_mask=None):
        # Keras passes an upstream mask as `inputs_mask` once a call has two tensors.
        mask = inputs_mask if mask is None else mask
        y, routing = self.outputs_and_routing(inputs, mask, training, token_ids)
        watched = _watched.get()
        if watched is not None:
            watched[id(self)] = routing
            return y
        for loss in self.router.auxiliary_losses(routing):
            self.add_loss(loss)
        if keeps_statistics():
            statistics = metrics.statistics(routing, self.router.num_experts)
            for variable, value in zip(self.statistics, statistics, strict=True):
                variable.assign_add(value)
        return y

    def outputs_and_routing(self, inputs, mask=None, training=False, token_ids=None, drops=True):
        """What a call of the built layer computes, and nothing that it keeps.

        For calls that are no step of training or evaluation: a text that is written token by token
        has no balancing loss and does not count in the statistics. And for a look at the routing.
        With `training` the router still learns what it learns from a call: thresholds and biases.

        Args:
            inputs: as in a call.
            mask: as in a call.
            training: as in a call.
            token_ids: as in a call.
            drops: whether the router has its capacity in inference, which `"batched"` experts need.

        Returns:
            Tuple of the outputs, as a call returns them, and their `Routing`.
        """
        inputs = ops.cast(inputs, self.compute_dtype)
        x_GSD, mask_GS = self._split(inputs, mask)
        mask_GS = gathered(mask_GS)
        groups, tokens, _ = ops.shape(x_GSD)
        engine = active()
        # Rows of one expert each go to that expert's device; rows as needed may go anywhere.
        compact = getattr(self.experts, "compact", False) and engine is None
        ids = self._split_ids(inputs, token_ids)
        drops = drops or getattr(self.experts, "implementation", None) == "batched"
        with contextlib.nullcontext() if drops else dropping_nothing():
            routing = self.router(x_GSD, mask=mask_GS, training=training, compact=compact, **ids)
        if engine is None:
            slots_RCD = dispatch(x_GSD, routing)
            slots_RCD = self.experts(slots_RCD, row_expert=routing.row_expert, training=training)
            y_GSD = combine(slots_RCD, routing, groups, tokens)
        else:
            y_GSD = engine.exchange(self.experts, x_GSD, routing, training)
        y = self._join(y_GSD, inputs)
        if self.shared is not None:
            y = y + self._shared_outputs(inputs, mask, training)
        return y, routing

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Plain: the experts, made in the same `keras.RematScope`, are what is computed again."""
        return layer_call

    def _split(self, inputs, mask):
        """Tokens in groups: `[groups, tokens, dim]` and their mask `[groups, tokens]`."""
        dim = inputs.shape[-1]
        if mask is not None:
            check_shape("mask", mask, inputs)
            mask = ops.cast(mask, "bool")
        if 0 in tuple(inputs.shape[:-1]):  # no tokens: one that is padding stands in
            return ops.zeros((1, 1, dim), inputs.dtype), ops.zeros((1, 1), "bool")
        if len(inputs.shape) == 3 and self.group == "sequence":
            return inputs, mask
        x_TD = ops.reshape(inputs, (-1, dim))
        mask_T = None if mask is None else ops.reshape(mask, (-1,))
        if isinstance(self.group, str):
            mask_GS = None if mask is None else ops.expand_dims(mask_T, 0)
            return ops.expand_dims(x_TD, 0), mask_GS

        num_tokens = ops.shape(x_TD)[0]
        padding = -num_tokens % self.group
        if not (isinstance(padding, int) and padding == 0):
            mask_T = ops.ones((num_tokens,), dtype="bool") if mask_T is None else mask_T
            x_TD = ops.pad(x_TD, ((0, padding), (0, 0)))
            mask_T = ops.pad(mask_T, ((0, padding),))
        mask_GS = None if mask_T is None else ops.reshape(mask_T, (-1, self.group))
        return ops.reshape(x_TD, (-1, self.group, dim)), mask_GS

    def _split_ids(self, inputs, token_ids):
        """`token_ids` in groups, as the keyword argument of a router that needs them."""
        if not self.router.needs_token_ids:
            if token_ids is not None:
                raise ValueError(
                    "`token_ids` must be left out for a router that does not hash them. "
                    f"Received: ids of shape {tuple(token_ids.shape)}, router={self.router!r}"
                )
            return {}
        if token_ids is None:
            raise ValueError(
                "`token_ids` must be given for a router that hashes them. "
                f"Received: token_ids=None, router={self.router!r}"
            )
        check_shape("token_ids", token_ids, inputs)
        ids_GS1, _ = self._split(ops.expand_dims(ops.cast(token_ids, "int32"), -1), None)
        return {"token_ids": ids_GS1[..., 0]}

    def _join(self, y_GSD, inputs):
        y_TD = ops.reshape(y_GSD, (-1, y_GSD.shape[-1]))
        leading = ops.shape(inputs)[:-1]
        if isinstance(self.group, int) or 0 in tuple(inputs.shape[:-1]):
            y_TD = y_TD[: math.prod(leading)]
        y = ops.reshape(y_TD, (*leading, y_GSD.shape[-1]))
        return ops.cast(y, self.compute_dtype)

    def _shared_outputs(self, inputs, mask, training):
        if mask is not None:
            valid = ops.expand_dims(ops.cast(mask, "bool"), -1)
            inputs = ops.where(valid, inputs, 0.0)
        if hasattr(self.shared, "num_experts"):
            x_TD = ops.reshape(inputs, (-1, inputs.shape[-1]))
            x_RTD = ops.broadcast_to(x_TD, (self.shared.num_experts, *ops.shape(x_TD)))
            y_TD = ops.sum(self.shared(x_RTD, training=training), axis=0)
            y = ops.reshape(y_TD, (*ops.shape(inputs)[:-1], y_TD.shape[-1]))
        else:
            y = self.shared(inputs, training=training)
        y = ops.cast(y, self.compute_dtype)
        return y if mask is None else ops.where(valid, y, 0.0)

    def compute_output_shape(self, input_shape):
        slots_shape = (None, None, input_shape[-1])
        return (*input_shape[:-1], self.experts.compute_output_shape(slots_shape)[-1])

    def save_own_variables(self, store):
        """Statistics of the run are not part of a checkpoint."""

    def load_own_variables(self, store):
        """Statistics of the run are not part of a checkpoint."""

    def get_config(self):
        return {
            **super().get_config(),
            "experts": keras.saving.serialize_keras_object(self.experts),
            "router": keras.saving.serialize_keras_object(self.router),
            "group": self.group,
            "shared": keras.saving.serialize_keras_object(self.shared),
        }

    @classmethod
    def from_config(cls, config):
        # Not built on their own, or their weights' paths would lack this layer's name.
        parts = {
            name: keras.saving.deserialize_keras_object({**config[name], "build_config": None})
            for name in ("experts", "router", "shared")
            if config.get(name) is not None
        }
        return cls(**{**config, **parts})


def check_shape(name, value, inputs):
    """Raises a ValueError unless there is one of `value` for each token of `inputs`."""
    given, allowed = tuple(value.shape), tuple(inputs.shape[:-1])
    fits = len(given) == len(allowed) and all(
        a == b or None in (a, b) for a, b in zip(given, allowed, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have the inputs' shape without the last axis, {allowed}. "
            f"Received: {name} of shape {given}"
        )
