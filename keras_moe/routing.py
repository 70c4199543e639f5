"""Routers: they decide which expert sees which token, and return that decision as plain tensors.

G groups, S tokens per group, D width, E experts, K experts per token, R rows of slots, C slots per
row (see `slots.py`). Logits, softmax and selection are float32 under every dtype policy, the
selective precision of Switch Transformers (https://arxiv.org/abs/2101.03961), section 2.4.
"""

import math
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import losses, slots
from keras_moe.ops import top_k, uniform


class Routing(NamedTuple):
    """A router's decision; losses, dispatch and metrics are functions of this data alone."""

    token_index: Any  # [G, R, C] the token in each slot, counted within its group; S where empty
    weight: Any  # [G, R, C] float32, what the slot's output is multiplied by; 0 where empty
    slot_index: Any  # [G, S, K] the slot r*C + c of each choice; R*C dropped; None: experts chose
    row_expert: Any  # [R] the expert of each row, E: nobody's; None when row e is expert e's
    expert_index: Any  # [G, S, K] the chosen experts, before dropping; E for padding; None as above
    logits: Any  # [G, S, E] float32
    probabilities: Any  # [G, S, E] float32
    mask: Any  # [G, S] booleans, False for padding; None when there is none


def seat_choices(expert_index_GSK, weight_GSK, num_experts, capacity=None, compact=False):
    """Seats the tokens' choices: the first four fields of a `Routing`.

    Args:
        expert_index_GSK: `[groups, tokens, k]` integers; `num_experts` marks padding.
        weight_GSK: `[groups, tokens, k]` float32 weights.
        num_experts: integer.
        capacity: slots per expert and group; `None` seats every choice.
        compact: whether experts get as many rows as they need, the groups pooled, with a capacity
            too; without one they always do.

    Returns:
        Tuple `(token_index, weight, slot_index, row_expert)`.
    """
    groups, tokens, k = ops.shape(expert_index_GSK)
    expert_index_GN = ops.reshape(expert_index_GSK, (groups, tokens * k))
    if capacity is None or compact:
        table = slots.by_rows(expert_index_GN, num_experts, capacity)
        weight_GN = ops.reshape(weight_GSK, (1, groups * tokens * k))
    else:
        table = slots.by_capacity(expert_index_GN, num_experts, capacity)
        weight_GN = ops.reshape(weight_GSK, (groups, tokens * k))
    weight_GRC = slots.look_up(weight_GN, table.assignment_index)
    slot_index_GSK = ops.reshape(table.slot_index, (groups, tokens, k))
    return table.assignment_index // k, weight_GRC, slot_index_GSK, table.row_expert


class Router(keras.layers.Layer):
    """Base of all routers: one linear layer without bias, its weight named `kernel`.

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: capacity while training; see the subclasses.
        eval_capacity_factor: capacity in inference.
        jitter: multiplies the router's input, and nothing else, by uniform noise from
            `[1 - jitter, 1 + jitter]` while training (Switch Transformers, App. C).
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: initializer of the `[dim, num_experts]` kernel. The default is the one
            of the public Switch and expert choice models.
        seed: integer, seed of the jitter.
    """

    def __init__(
        self,
        num_experts=None,
        capacity_factor=None,
        eval_capacity_factor=None,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**{"name": "router", **kwargs, "dtype": "float32"})
        if num_experts is not None and num_experts < 1:
            raise ValueError(
                f"`num_experts` must be a positive integer. Received: num_experts={num_experts}"
            )
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor is not None and factor <= 0:
                raise ValueError(
                    f"`{name}` must be a positive number or None. Received: {name}={factor}"
                )
        if not 0 <= jitter < 1:
            raise ValueError(f"`jitter` must be in [0, 1). Received: jitter={jitter}")
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.jitter = jitter
        self.router_z_weight = router_z_weight
        self.kernel_initializer = keras.initializers.get(
            kernel_initializer or keras.initializers.TruncatedNormal(stddev=0.02)
        )
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        self.built = False

    def set_num_experts(self, num_experts):
        """Tells the router how many experts there are; it must agree with what it was told before.

        Raises:
            ValueError: if the router was made for another number of experts.
        """
        if self.num_experts not in (None, num_experts):
            raise ValueError(
                "The router and the experts must agree in number. Received: a router with "
                f"num_experts={self.num_experts} for num_experts={num_experts} experts"
            )
        self.num_experts = num_experts

    def build(self, input_shape):
        if self.num_experts is None:
            raise ValueError(
                "`num_experts` must be given to a router that is used on its own. "
                "Received: num_experts=None"
            )
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=self.kernel_initializer,
        )

    def score(self, inputs, mask=None, training=False):
        """Logits and their softmax over experts, `[groups, tokens, experts]` float32 each.

        Padding counts as zeros, for it may hold anything, NaN included.
        """
        inputs = ops.cast(inputs, "float32")
        if mask is not None:
            inputs = ops.where(mask[..., None], inputs, 0.0)
        if training and self.jitter > 0:
            low, high = 1.0 - self.jitter, 1.0 + self.jitter
            noise = uniform(ops.shape(inputs), low, high, self.seed_generator)
            inputs = inputs * noise
        logits = ops.matmul(inputs, self.kernel)
        return logits, ops.softmax(logits, axis=-1)

    @property
    def one_row_per_expert(self):
        """Whether row `e` of the slots is expert `e`'s, in training and in inference."""
        return True

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Plain: in a `keras.RematScope` a router has little to compute again, and its noise."""
        return layer_call

    def auxiliary_losses(self, routing):
        """The router's own losses, each times its weight: a list of scalars."""
        if self.router_z_weight == 0:
            return []
        return [self.router_z_weight * losses.router_z(routing.logits, routing.mask)]

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "jitter": self.jitter,
            "router_z_weight": self.router_z_weight,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class TopKRouter(Router):
    """Every token goes to its `k` most probable experts.

    With a capacity, slots are filled in token order, all `k` choices of a token before the next
    token's, so that within a group a later token never takes an earlier one's place (GShard, which
    fills all first choices first, lets it). Without one (the default, as in Mixtral and OLMoE)
    no token is dropped.

    Sources: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eqs. 3 and 5; GShard
    (https://arxiv.org/abs/2006.16668), Algorithm 1; Mixtral (https://arxiv.org/abs/2401.04088).

    Args:
        k: experts per token.
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: slots per expert, relative to `k * tokens / num_experts`, while training;
            `None` drops nothing.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group.
        normalize: divides the weights by their sum over the `k` chosen experts. With `k=1` the
            weight would always be 1 and the task would teach the router nothing, so there the
            weight is the raw probability.
        load_balancing_weight: weight of `keras_moe.losses.load_balancing`.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`; ST-MoE and OLMoE use 1e-3.
        kernel_initializer: see `Router`.
        seed: see `Router`.

    Call arguments:
        inputs: `[groups, tokens, dim]` tensor.
        mask: `[groups, tokens]` booleans, `False` for padding.
        training: boolean.
        compact: boolean, whether experts may have any number of rows of slots each, where a row of
            the capacity's length for every expert would leave many empty.

    Returns:
        A `Routing`.

    Raises:
        ValueError: if an argument is out of range; if `k` exceeds the number of experts.
    """

    def __init__(
        self,
        k,
        num_experts=None,
        capacity_factor=None,
        eval_capacity_factor=None,
        min_capacity=4,
        normalize=True,
        load_balancing_weight=1e-2,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        if k < 1:
            raise ValueError(f"`k` must be a positive integer. Received: k={k}")
        if min_capacity < 1:
            raise ValueError(
                f"`min_capacity` must be a positive integer. Received: min_capacity={min_capacity}"
            )
        super().__init__(
            num_experts,
            capacity_factor,
            eval_capacity_factor,
            jitter,
            router_z_weight,
            kernel_initializer,
            seed,
            **kwargs,
        )
        self.k = k
        self.min_capacity = min_capacity
        self.normalize = normalize
        self.load_balancing_weight = load_balancing_weight
        if num_experts is not None:
            self.set_num_experts(num_experts)

    def set_num_experts(self, num_experts):
        if self.k > num_experts:
            raise ValueError(
                "`k` must be at most the number of experts. "
                f"Received: k={self.k} for num_experts={num_experts}"
            )
        super().set_num_experts(num_experts)

    @property
    def one_row_per_expert(self):
        return None not in (self.capacity_factor, self.eval_capacity_factor)

    def call(self, inputs, mask=None, training=False, compact=False):
        logits_GSE, probabilities_GSE = self.score(inputs, mask, training)
        weight_GSK, expert_index_GSK = top_k(probabilities_GSE, self.k)
        if self.normalize and self.k > 1:
            weight_GSK = weight_GSK / ops.sum(weight_GSK, axis=-1, keepdims=True)
        if mask is not None:
            expert_index_GSK = ops.where(mask[:, :, None], expert_index_GSK, self.num_experts)
        tokens = ops.shape(inputs)[1]
        capacity, slack = self._capacity(tokens, training)
        if compact and slack >= 1.5:
            roomy = isinstance(tokens, int) and capacity >= tokens
            capacity = None if roomy else capacity
        else:
            compact = False
        seats = seat_choices(expert_index_GSK, weight_GSK, self.num_experts, capacity, compact)
        return Routing(*seats, expert_index_GSK, logits_GSE, probabilities_GSE, mask)

    def _capacity(self, tokens, training):
        """Slots per expert and group, and how many slots there are at least per choice."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None, 1.0
        capacity = slots.capacity(
            tokens, self.num_experts, factor, self.k, minimum=self.min_capacity
        )
        if not isinstance(tokens, int):
            return capacity, factor
        return capacity, self.num_experts * capacity / (tokens * self.k)

    def auxiliary_losses(self, routing):
        result = super().auxiliary_losses(routing)
        if self.load_balancing_weight != 0:
            loss = losses.load_balancing(routing.probabilities, routing.expert_index, routing.mask)
            result.append(self.load_balancing_weight * loss)
        return result

    def get_config(self):
        return {
            **super().get_config(),
            "k": self.k,
            "min_capacity": self.min_capacity,
            "normalize": self.normalize,
            "load_balancing_weight": self.load_balancing_weight,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class SwitchRouter(TopKRouter):
    """Every token goes to its one most probable expert, weighted by the raw probability.

    Switch Transformers (https://arxiv.org/abs/2101.03961), Eqs. 1-6. Exactly the capacity is kept
    (the paper's pseudo-code keeps one less), and the jitter multiplies the router's input, as the
    text has it (the pseudo-code adds it to the logits).

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: slots per expert, relative to `tokens / num_experts`, while training;
            `None` drops nothing.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group.
        load_balancing_weight: weight of `keras_moe.losses.load_balancing`, the paper's alpha.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: see `Router`.
        seed: see `Router`.

    Call arguments, returns and raises: as `TopKRouter`.
    """

    def __init__(
        self,
        num_experts=None,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        min_capacity=4,
        load_balancing_weight=1e-2,
        jitter=1e-2,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            k=1,
            num_experts=num_experts,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            load_balancing_weight=load_balancing_weight,
            jitter=jitter,
            router_z_weight=router_z_weight,
            kernel_initializer=kernel_initializer,
            seed=seed,
            **kwargs,
        )

    def get_config(self):
        config = super().get_config()
        del config["k"], config["normalize"]
        return config


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertChoiceRouter(Router):
    """Every expert takes its best tokens; all experts carry the same load, and none is dropped.

    A token is seen by no expert, one or many; the weight is the raw score, a softmax over experts.
    The choice looks at the whole group: in a decoder a token would see the future, and the outputs
    of a group depend on all of its tokens. With `inference="threshold"` the layer learns, while
    training, the score below which each expert refuses, and in inference routes every token by
    itself against it, so that generation is causal and independent of the batch.

    Expert Choice (https://arxiv.org/abs/2202.09368), Eqs. 1-4. The learnt threshold is the
    substitute that Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), App. F, proposes for
    batchwise selection; here it is a running mean of the lowest score taken, not a trained weight.

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: mean number of experts per token while training.
        eval_capacity_factor: the same in inference; `None`: as while training.
        max_experts_per_token: most experts that may share a token (EC-CAP in the paper); `None`
            for no cap.
        inference: `"top_k"`: as while training; `"threshold"`: each token alone. A token then takes
            at most `max_experts_per_token` experts, or twice the capacity factor, rounded up, if
            there is no cap (3 % of the paper's tokens took more).
        threshold_momentum: weight of the past in the running mean of the cut-offs.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: see `Router`.
        seed: see `Router`.

    Call arguments:
        inputs: `[groups, tokens, dim]` tensor.
        mask: `[groups, tokens]` booleans, `False` for padding.
        training: boolean.
        compact: boolean, of no effect: experts that choose fill one row each, and the threshold
            makes as many rows as are needed.

    Returns:
        A `Routing`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_experts=None,
        capacity_factor=2.0,
        eval_capacity_factor=None,
        max_experts_per_token=None,
        inference="top_k",
        threshold_momentum=0.99,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        if capacity_factor is None:
            raise ValueError(
                "`capacity_factor` of expert choice is the mean number of experts per token and "
                "must be a positive number. Received: capacity_factor=None"
            )
        if max_experts_per_token is not None and max_experts_per_token < 1:
            raise ValueError(
                "`max_experts_per_token` must be a positive integer or None. "
                f"Received: max_experts_per_token={max_experts_per_token}"
            )
        if inference not in ("top_k", "threshold"):
            raise ValueError(
                f"`inference` must be 'top_k' or 'threshold'. Received: inference={inference!r}"
            )
        if not 0 <= threshold_momentum < 1:
            raise ValueError(
                "`threshold_momentum` must be in [0, 1). "
                f"Received: threshold_momentum={threshold_momentum}"
            )
        super().__init__(
            num_experts,
            capacity_factor,
            eval_capacity_factor,
            jitter,
            router_z_weight,
            kernel_initializer,
            seed,
            **kwargs,
        )
        self.max_experts_per_token = max_experts_per_token
        self.inference = inference
        self.threshold_momentum = threshold_momentum

    def build(self, input_shape):
        super().build(input_shape)
        if self.inference == "threshold":
            self.threshold = self.add_weight(
                name="threshold",
                shape=(self.num_experts,),
                initializer=keras.initializers.Constant(-1.0),  # nothing learnt yet
                trainable=False,
            )

    @property
    def one_row_per_expert(self):
        return self.inference != "threshold"

    def call(self, inputs, mask=None, training=False, compact=False):
        logits_GSE, probabilities_GSE = self.score(inputs, mask, training)
        if self.inference == "threshold" and not training:
            return self._route_by_threshold(logits_GSE, probabilities_GSE, mask)
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        tokens = ops.shape(inputs)[1]
        capacity = slots.capacity(tokens, self.num_experts, factor)
        capacity = (
            min(tokens, capacity) if isinstance(tokens, int) else ops.minimum(tokens, capacity)
        )
        token_index_GEC, weight_GEC = slots.by_score(
            probabilities_GSE, capacity, mask, self.max_experts_per_token
        )
        if self.inference == "threshold":
            self._learn_threshold(token_index_GEC, weight_GEC, tokens)
        return Routing(
            token_index_GEC, weight_GEC, None, None, None, logits_GSE, probabilities_GSE, mask
        )

    def _learn_threshold(self, token_index_GEC, weight_GEC, tokens):
        # An expert that could not fill its slots took every token there was: its cut-off is 0.
        taken_GEC = token_index_GEC < tokens
        full_GE = ops.all(taken_GEC, axis=-1)
        cutoff_GE = ops.where(full_GE, ops.min(weight_GEC, axis=-1), 0.0)
        seen_G = ops.cast(ops.any(taken_GEC, axis=(1, 2)), "float32")  # not padding alone
        cutoff_E = ops.sum(cutoff_GE, axis=0) / ops.maximum(ops.sum(seen_G), 1.0)
        cutoff_E = ops.stop_gradient(cutoff_E)
        momentum = ops.where(self.threshold < 0, 0.0, self.threshold_momentum)
        momentum = ops.where(ops.any(seen_G > 0), momentum, 1.0)
        self.threshold.assign(momentum * self.threshold + (1.0 - momentum) * cutoff_E)

    def _route_by_threshold(self, logits_GSE, probabilities_GSE, mask):
        cap = self.max_experts_per_token or math.ceil(2 * self.capacity_factor)
        weight_GSK, expert_index_GSK = top_k(probabilities_GSE, min(cap, self.num_experts))
        taken_GSK = weight_GSK >= ops.take(self.threshold, expert_index_GSK)
        if mask is not None:
            taken_GSK = taken_GSK & mask[:, :, None]
        expert_index_GSK = ops.where(taken_GSK, expert_index_GSK, self.num_experts)
        seats = seat_choices(expert_index_GSK, weight_GSK, self.num_experts)
        return Routing(*seats, expert_index_GSK, logits_GSE, probabilities_GSE, mask)

    def get_config(self):
        return {
            **super().get_config(),
            "max_experts_per_token": self.max_experts_per_token,
            "inference": self.inference,
            "threshold_momentum": self.threshold_momentum,
        }
