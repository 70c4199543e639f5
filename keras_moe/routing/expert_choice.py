"""Routers by which experts choose tokens. Letters as in `base.py`."""

import math

import keras
from keras import ops

from keras_moe import slots
from keras_moe.distribution.active import by_groups
from keras_moe.ops import smallest, take_entries, top_k
from keras_moe.routing.base import (
    Router,
    Routing,
    positive_integer,
    positive_number,
    seat_choices,
)


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertChoiceRouter(Router):
    """Every expert takes its best tokens; all experts carry the same load, and none is dropped.

    A token is seen by no expert, one or many; the weight is the raw score, a softmax over experts.
    The choice looks at the whole group: in a decoder a token would see the future, and the outputs
    of a group depend on all of its tokens. With `inference="threshold"` the layer learns, while
    training, the score below which each expert refuses, and in inference routes every token by
    itself against it, so that generation is causal and independent of the batch.

    Expert Choice (https://arxiv.org/abs/2202.09368), Eqs. 1-4, and section 3.3 for the cap. The
    learnt threshold is the substitute that Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538),
    App. F, proposes for batchwise selection; here it is a running mean of the lowest score taken,
    not a trained weight.

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: mean number of experts per token while training. Padding counts as tokens:
            where there is some, the others get more experts each.
        eval_capacity_factor: the same in inference; `None`: as while training.
        max_experts_per_token: most experts that may share a token (EC-CAP in the paper); `None`
            for no cap. It always holds, and every slot is still filled if the tokens have room for
            all: tokens keep the experts with the highest scores, and an expert that was refused
            takes its best tokens that have room.
        linear_programme: whether experts ask first in the order that the paper's
            entropy-regularised linear programme gives the tokens. Its hundred iterations take time
            and gain little: either way the scores taken add up to 99 % of the most possible, or
            more.
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
        linear_programme=False,
        inference="top_k",
        threshold_momentum=0.99,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        if linear_programme and max_experts_per_token is None:
            raise ValueError(
                "`linear_programme` must come with a cap, `max_experts_per_token`. "
                "Received: linear_programme=True, max_experts_per_token=None"
            )
        positive_number("capacity_factor", capacity_factor, optional=True)
        positive_number("eval_capacity_factor", eval_capacity_factor, optional=True)
        if capacity_factor is None:
            raise ValueError(
                "`capacity_factor` of expert choice is the mean number of experts per token and "
                "must be a positive number. Received: capacity_factor=None"
            )
        positive_integer("max_experts_per_token", max_experts_per_token, optional=True)
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
        self.linear_programme = linear_programme
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
                aggregation="mean",
            )

    @property
    def experts_per_token(self):
        return min(self.capacity_factor, self.num_experts)

    @property
    def is_causal(self):
        return self.inference == "threshold"

    @property
    def one_row_per_expert(self):
        return self.inference != "threshold"

    def capacity_of(self, tokens):
        if self.inference == "threshold":
            return None
        factor = self.eval_capacity_factor or self.capacity_factor
        return slots.capacity(tokens, self.num_experts, factor)

    def call(self, inputs, mask=None, training=False, compact=False):
        logits_GSE, probabilities_GSE = self.score(inputs, mask, training)
        if self.inference == "threshold" and not training:
            taken_GSE = probabilities_GSE >= self.threshold
            return self.route_each_alone(taken_GSE, logits_GSE, probabilities_GSE, mask)
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        routing = self.route_the_best(factor, logits_GSE, probabilities_GSE, mask)
        if self.inference == "threshold" and self.trainable:
            self._learn_threshold(routing.token_index, routing.weight, ops.shape(inputs)[1])
        return routing

    def route_the_best(self, factor, logits_GSE, probabilities_GSE, mask):
        """The `Routing` by which every expert takes its best tokens of the group."""
        tokens = ops.shape(probabilities_GSE)[1]
        capacity = smallest(tokens, slots.capacity(tokens, self.num_experts, factor))

        def choose(score_GSE, mask_GS):
            cap = (self.max_experts_per_token, self.linear_programme)
            return slots.by_score(score_GSE, capacity, mask_GS, *cap)

        seats = by_groups(choose, probabilities_GSE, mask)
        return Routing(*seats, None, None, None, logits_GSE, probabilities_GSE, mask)

    def route_each_alone(self, taken_GSE, logits_GSE, probabilities_GSE, mask):
        """The `Routing` of every token to those of its best experts that take it."""
        cap = self.max_experts_per_token or math.ceil(2 * self.capacity_factor)
        weight_GSK, expert_index_GSK = top_k(probabilities_GSE, min(cap, self.num_experts))
        taken_GSK = take_entries(taken_GSE, expert_index_GSK, axis=-1)
        if mask is not None:
            taken_GSK = taken_GSK & mask[:, :, None]
        expert_index_GSK = ops.where(taken_GSK, expert_index_GSK, self.num_experts)
        seats = seat_choices(expert_index_GSK, weight_GSK, self.num_experts)
        return Routing(*seats, expert_index_GSK, logits_GSE, probabilities_GSE, mask)

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

    def get_config(self):
        return {
            **super().get_config(),
            "max_experts_per_token": self.max_experts_per_token,
            "linear_programme": self.linear_programme,
            "inference": self.inference,
            "threshold_momentum": self.threshold_momentum,
        }
