"""Routers by which tokens choose experts. Letters as in `base.py`."""

from numbers import Integral

import keras
from keras import ops

from keras_moe import losses, slots
from keras_moe.distribution.active import by_groups
from keras_moe.ops import dropout, take_entries, top_k, uniform
from keras_moe.routing.base import (
    Router,
    Routing,
    eval_drops,
    layer_options,
    not_negative,
    positive_integer,
    seat_choices,
)


@keras.saving.register_keras_serializable(package="keras_moe")
class TopKRouter(Router):
    """Every token goes to its `k` most probable experts.

    With a capacity, slots are filled in token order, all `k` choices of a token before the next
    token's, so that within a group a later token never takes an earlier one's place (GShard, which
    fills all first choices first, lets it). Without one (the default, as in Mixtral and OLMoE)
    no token is dropped.

    Sources: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eqs. 3 and 5; GShard
    (https://arxiv.org/abs/2006.16668), Algorithm 1, without its random second choice (the second
    expert is always asked) and without its auxiliary loss, which counts first choices only; Mixtral
    (https://arxiv.org/abs/2401.04088).

    Args:
        k: experts per token.
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: slots per expert, relative to `k * tokens / num_experts`, while training;
            `None` drops nothing, and 0 leaves `min_capacity` slots, however many tokens there are.
        eval_capacity_factor: the same in inference. The weights do not depend on it: what was
            trained with a capacity is evaluated without drops when it is `None`, and it may be set
            on the router of a loaded model, before that first predicts.
        min_capacity: fewest slots per expert and group.
        priority: who sits first under a capacity. `"position"`: earlier tokens. `"probability"`:
            the tokens that are surest of their first choice, all first choices before any second
            choice (Batch Prioritized Routing, V-MoE, https://arxiv.org/abs/2106.05974, section 4).
            With a tight capacity it drops what matters least, but whether a token is dropped then
            depends on the whole group, later tokens too: for encoders only.
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
        priority="position",
        normalize=True,
        load_balancing_weight=1e-2,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        positive_integer("k", k)
        positive_integer("min_capacity", min_capacity)
        not_negative("load_balancing_weight", load_balancing_weight)
        if priority not in ("position", "probability"):
            raise ValueError(
                f"`priority` must be 'position' or 'probability'. Received: priority={priority!r}"
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
        self.priority = priority
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
    def experts_per_token(self):
        return self.k

    @property
    def is_causal(self):
        return self.priority == "position"

    @property
    def one_row_per_expert(self):
        return None not in (self.capacity_factor, self.eval_capacity_factor)

    def call(self, inputs, mask=None, training=False, compact=False):
        logits_GSE, probabilities_GSE = self.score(inputs, mask, training)
        return self.route(logits_GSE, probabilities_GSE, mask, training, compact)

    def route(self, logits_GSE, probabilities_GSE, mask, training, compact):
        """The `Routing` that follows from the scores."""
        weight_GSK, expert_index_GSK = self.choose(probabilities_GSE, training)
        confidence_GS = weight_GSK[..., 0] if self.priority == "probability" else None
        if self.normalize and self.k > 1:
            weight_GSK = weight_GSK / ops.sum(weight_GSK, axis=-1, keepdims=True)
        if mask is not None:
            expert_index_GSK = ops.where(mask[:, :, None], expert_index_GSK, self.num_experts)
        tokens = ops.shape(probabilities_GSE)[1]
        capacity, compact = self.seating(tokens, self.k, training, compact)
        taken = self.settle(
            probabilities_GSE, weight_GSK, expert_index_GSK, capacity, confidence_GS
        )
        seats = seat_choices(*taken, self.num_experts, capacity, compact, confidence_GS)
        return Routing(*seats, expert_index_GSK, logits_GSE, probabilities_GSE, mask)

    def choose(self, probabilities_GSE, training):
        """Probability and number of each token's experts, the best first, `[groups, tokens, k]`."""
        return top_k(probabilities_GSE, self.k)

    def settle(self, probabilities_GSE, weight_GSK, expert_index_GSK, capacity, confidence_GS):
        """The experts that take the tokens, and their weights, `[groups, tokens, k]` each."""
        return expert_index_GSK, weight_GSK

    def seating(self, tokens, k, training, compact):
        """How `k` choices per token are seated: `capacity` and `compact` of `seat_choices`."""
        capacity, slack = self._capacity(tokens, k, training)
        if not compact or slack < 1.5:
            return capacity, False
        roomy = isinstance(tokens, int) and capacity >= tokens
        return None if roomy else capacity, True

    def _capacity(self, tokens, k, training):
        """Slots per expert and group, and how many slots there are at least per choice."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if not training and not eval_drops():
            factor = None
        if factor is None:
            return None, 1.0
        capacity = slots.capacity(tokens, self.num_experts, factor, k, minimum=self.min_capacity)
        if not isinstance(tokens, int):
            return capacity, factor
        return capacity, self.num_experts * capacity / (tokens * k)

    def capacity_of(self, tokens):
        return self._capacity(tokens, self.k, training=False)[0]

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
            "priority": self.priority,
            "normalize": self.normalize,
            "load_balancing_weight": self.load_balancing_weight,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class SwitchRouter(TopKRouter):
    """Every token goes to one expert, its most probable one, weighted by the raw probability.

    Switch Transformers (https://arxiv.org/abs/2101.03961), Eqs. 1-6. Exactly the capacity is kept
    (the paper's pseudo-code keeps one less), and the jitter multiplies the router's input, as the
    text has it (the pseudo-code adds it to the logits).

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: slots per expert, relative to `tokens / num_experts`, while training;
            `None` drops nothing, and 0 leaves `min_capacity` slots, however many tokens there are.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group.
        priority: see `TopKRouter`.
        load_balancing_weight: weight of `keras_moe.losses.load_balancing`, the paper's alpha. The
            loss counts first choices, before any is dropped or rerouted.
        exploration: how experts are tried that are not the most probable ones, while training only
            (the paper's appendix C): `"jitter"`, by noise on the router's input; `"dropout"`, by
            dropping entries of it; `"sample"`, by drawing the expert from the softmax, its weight
            being its own probability; `"argmax"`, not at all.
        jitter: amount of the jitter, see `Router`.
        input_dropout: rate of the dropout.
        reroutes: what the paper calls no token left behind (appendix B): how many more experts a
            token tries whose expert is full, the most probable first. All first choices are seated
            before any second one, and so on, which lets a later token take the place of an earlier
            one: an encoder may do so, in a decoder it leaks the future.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: see `Router`.
        seed: integer, seed of the exploration.

    Call arguments and returns: as `TopKRouter`; `expert_index` holds the first choices.

    Raises:
        ValueError: if an argument is out of range; if there are more `reroutes` than other experts.
    """

    def __init__(
        self,
        num_experts=None,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        min_capacity=4,
        priority="position",
        load_balancing_weight=1e-2,
        exploration="jitter",
        jitter=1e-2,
        input_dropout=0.1,
        reroutes=0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        if exploration not in ("argmax", "sample", "dropout", "jitter"):
            raise ValueError(
                "`exploration` must be 'argmax', 'sample', 'dropout' or 'jitter'. "
                f"Received: exploration={exploration!r}"
            )
        if not 0 <= input_dropout < 1:
            raise ValueError(
                f"`input_dropout` must be in [0, 1). Received: input_dropout={input_dropout}"
            )
        not_negative("reroutes", reroutes, Integral)
        self.exploration = exploration
        self.input_dropout = input_dropout
        self.reroutes = reroutes
        super().__init__(
            k=1,
            num_experts=num_experts,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            priority=priority,
            load_balancing_weight=load_balancing_weight,
            jitter=jitter,
            router_z_weight=router_z_weight,
            kernel_initializer=kernel_initializer,
            seed=seed,
            **layer_options(self, kwargs),
        )

    @property
    def is_causal(self):
        return super().is_causal and self.reroutes == 0

    def set_num_experts(self, num_experts):
        if self.reroutes >= num_experts:
            raise ValueError(
                "`reroutes` must be less than the number of experts. "
                f"Received: reroutes={self.reroutes} for num_experts={num_experts}"
            )
        super().set_num_experts(num_experts)

    def prepare(self, inputs, mask=None, training=False):
        inputs = super().prepare(inputs, mask, training and self.exploration == "jitter")
        if training and self.exploration == "dropout":
            inputs = dropout(inputs, self.input_dropout, self.seed_generator)
        return inputs

    def choose(self, probabilities_GSE, training):
        if not training or self.exploration != "sample":
            return super().choose(probabilities_GSE, training)
        # The expert whose stretch of the cumulated probabilities a uniform number falls into.
        shape_GS1 = (*ops.shape(probabilities_GSE)[:2], 1)
        drawn_GS1 = uniform(shape_GS1, 0.0, 1.0, self.seed_generator)
        below_GSE = ops.cumsum(probabilities_GSE, axis=-1) <= drawn_GS1
        expert_GS1 = ops.sum(ops.cast(below_GSE, "int32"), axis=-1, keepdims=True)
        expert_GS1 = ops.minimum(expert_GS1, self.num_experts - 1)  # they may sum to 1 - 1e-7
        return take_entries(probabilities_GSE, expert_GS1, axis=-1), expert_GS1

    def settle(self, probabilities_GSE, weight_GSK, expert_index_GSK, capacity, confidence_GS):
        if self.reroutes == 0 or capacity is None:
            return expert_index_GSK, weight_GSK
        first_GSE = expert_index_GSK == ops.arange(self.num_experts, dtype="int32")
        _, next_GSK = top_k(ops.where(first_GSE, -1.0, probabilities_GSE), self.reroutes)
        wish_GSK = ops.concatenate([expert_index_GSK, next_GSK], axis=-1)

        def reroute(wish_GSK, confidence_GS):
            order_GS = None if confidence_GS is None else slots.by_confidence(confidence_GS, 1)
            return slots.reroute(wish_GSK, self.num_experts, capacity, order_GS)[..., None]

        expert_GS1 = by_groups(reroute, wish_GSK, confidence_GS)
        known_GS1 = ops.minimum(expert_GS1, self.num_experts - 1)
        return expert_GS1, take_entries(probabilities_GSE, known_GS1, axis=-1)

    def get_config(self):
        config = super().get_config()
        del config["k"], config["normalize"]
        return {
            **config,
            "exploration": self.exploration,
            "input_dropout": self.input_dropout,
            "reroutes": self.reroutes,
        }
