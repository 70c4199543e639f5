"""The router of the DeepSeek-V3 family: balanced without a loss. Letters as in `base.py`.

H groups of experts, B best groups of a token.
"""

from numbers import Integral

import keras
import numpy as np
from keras import ops

from keras_moe import losses, slots
from keras_moe.ops import take_entries, top_k
from keras_moe.routing.base import not_negative, positive_number
from keras_moe.routing.token_choice import TopKRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class LossFreeRouter(TopKRouter):
    """Every token goes to the `k` experts of its largest biased scores; biases balance the load.

    Experts are chosen by `score + bias` and weighted by the score alone. The bias has no gradient;
    after every training step `bias += bias_update_rate * sign(mean(count) - count)`, where `count`
    is how many choices fell on each expert in this step, before any is dropped, padding excluded.
    An expert that got too little becomes easier to choose, and no loss pulls at the scores. Nothing
    changes in inference, nor while the router is not trainable.

    Loss-free balancing (https://arxiv.org/abs/2408.15664), Algorithm 1; DeepSeek-V3
    (https://arxiv.org/abs/2412.19437), Eqs. 13-16 and, for the loss of each sequence, 17-20.

    With `num_groups` the experts lie in groups of neighbours (of one device, say), and a token
    chooses among the experts of its `top_groups` best groups only. A group's score is the sum of
    its two largest biased scores, as in DeepSeek-V3 (section 2.1.2), or the largest, as in
    DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.2.2).

    Example:

    ```python
    v3 = keras_moe.LossFreeRouter(
        8, num_groups=8, top_groups=4, scale=2.5, sequence_balancing_weight=1e-4
    )
    v2 = keras_moe.LossFreeRouter(
        6, score_function="softmax", bias_update_rate=0.0, num_groups=8, top_groups=3,
        group_score="max", normalize=False, scale=16.0, load_balancing_weight=0.003,
    )
    ```

    Args:
        k: experts per token.
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        score_function: `"sigmoid"`, each expert by itself, or `"softmax"`, over all experts.
        bias_update_rate: how far a step moves each bias, not negative. 1e-3 suits sigmoid scores; 0
            leaves the biases as they are.
        num_groups: groups of experts, a divisor of their number; `None`: choose among all.
        top_groups: groups a token may choose from.
        group_score: `"top2"` or `"max"`.
        normalize: divides the weights by their sum over the `k` chosen experts, but for `k=1`.
        scale: multiplies the weights.
        capacity_factor: slots per expert, relative to `k * tokens / num_experts`, while training;
            `None` drops nothing.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group of tokens.
        priority: see `TopKRouter`; a token's confidence is its first choice's score.
        load_balancing_weight: weight of `keras_moe.losses.load_balancing`.
        sequence_balancing_weight: weight of `keras_moe.losses.sequence_balancing`, of the experts
            that the scores alone would choose, each group of tokens a sequence. Probabilities are
            the scores divided by their sum, in both losses.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: see `Router`.
        seed: see `Router`.

    Call arguments, returns and raises: as `TopKRouter`. The `probabilities` of the `Routing` are
    the scores divided by their sum.
    """

    def __init__(
        self,
        k,
        num_experts=None,
        score_function="sigmoid",
        bias_update_rate=1e-3,
        num_groups=None,
        top_groups=None,
        group_score="top2",
        normalize=True,
        scale=1.0,
        capacity_factor=None,
        eval_capacity_factor=None,
        min_capacity=4,
        priority="position",
        load_balancing_weight=0.0,
        sequence_balancing_weight=0.0,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        if score_function not in ("sigmoid", "softmax"):
            raise ValueError(
                "`score_function` must be 'sigmoid' or 'softmax'. "
                f"Received: score_function={score_function!r}"
            )
        not_negative("bias_update_rate", bias_update_rate)
        not_negative("sequence_balancing_weight", sequence_balancing_weight)
        given = (num_groups, top_groups)
        are_integers = all(isinstance(number, Integral) for number in given)
        if given != (None, None) and not (are_integers and 1 <= top_groups <= num_groups):
            raise ValueError(
                "`num_groups` and `top_groups` must be positive integers, the second not above the "
                "first, or both None. "
                f"Received: num_groups={num_groups!r}, top_groups={top_groups!r}"
            )
        if group_score not in ("top2", "max"):
            raise ValueError(
                f"`group_score` must be 'top2' or 'max'. Received: group_score={group_score!r}"
            )
        positive_number("scale", scale)
        super().__init__(
            k,
            None,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            priority,
            normalize,
            load_balancing_weight,
            jitter,
            router_z_weight,
            kernel_initializer,
            seed,
            **kwargs,
        )
        self.score_function = score_function
        self.bias_update_rate = bias_update_rate
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.group_score = group_score
        self.scale = scale
        self.sequence_balancing_weight = sequence_balancing_weight
        if num_experts is not None:
            self.set_num_experts(num_experts)

    def set_num_experts(self, num_experts):
        super().set_num_experts(num_experts)
        if self.num_groups is None:
            return
        if num_experts % self.num_groups != 0:
            raise ValueError(
                "`num_groups` must divide the number of experts. "
                f"Received: num_groups={self.num_groups} for num_experts={num_experts}"
            )
        eligible = self.top_groups * (num_experts // self.num_groups)
        if self.k > eligible:
            raise ValueError(
                f"`k` must be at most the number of experts in `top_groups` groups, {eligible}. "
                f"Received: k={self.k}, top_groups={self.top_groups}"
            )

    def build(self, input_shape):
        super().build(input_shape)
        self.bias = self.add_weight(
            name="bias",
            shape=(self.num_experts,),
            initializer="zeros",
            trainable=False,
            aggregation="mean",
        )

    def score(self, inputs, mask=None, training=False):
        logits_GSE = ops.matmul(self.prepare(inputs, mask, training), self.kernel)
        if self.score_function == "softmax":
            return logits_GSE, ops.softmax(logits_GSE, axis=-1)
        return logits_GSE, ops.sigmoid(logits_GSE) + 1e-15  # or their sum's square could be 0

    def call(self, inputs, mask=None, training=False, compact=False):
        logits_GSE, scores_GSE = self.score(inputs, mask, training)
        routing = self.route(logits_GSE, scores_GSE, mask, training, compact)
        if training and self.trainable:
            self._update_bias(routing.expert_index)
        return routing._replace(
            weight=self.scale * routing.weight,
            probabilities=scores_GSE / ops.sum(scores_GSE, axis=-1, keepdims=True),
        )

    def choose(self, probabilities_GSE, training):
        wish_GSE = ops.stop_gradient(probabilities_GSE) + self.bias
        if self.num_groups is not None:
            wish_GSE = ops.where(self._is_eligible(wish_GSE), wish_GSE, -np.inf)
        _, expert_index_GSK = top_k(wish_GSE, self.k)
        return take_entries(probabilities_GSE, expert_index_GSK, axis=-1), expert_index_GSK

    def _is_eligible(self, wish_GSE):
        """Whether each expert is in one of the token's best groups."""
        groups, tokens, num_experts = ops.shape(wish_GSE)
        size = num_experts // self.num_groups
        wish_GSHx = ops.reshape(wish_GSE, (groups, tokens, self.num_groups, size))
        best_GSHx, _ = top_k(wish_GSHx, min(2, size) if self.group_score == "top2" else 1)
        _, group_index_GSB = top_k(ops.sum(best_GSHx, axis=-1), self.top_groups)
        group_H = ops.arange(self.num_groups, dtype="int32")
        eligible_GSH = ops.any(group_index_GSB[..., None] == group_H, axis=2)
        return ops.repeat(eligible_GSH, size, axis=-1)

    def _update_bias(self, expert_index_GSK):
        count_E = slots.count(ops.reshape(expert_index_GSK, (1, -1)), self.num_experts)[0]
        count_E = ops.cast(count_E, "float32")
        self.bias.assign_add(self.bias_update_rate * ops.sign(ops.mean(count_E) - count_E))

    def auxiliary_losses(self, routing):
        result = super().auxiliary_losses(routing)
        if self.sequence_balancing_weight != 0:
            _, expert_index_GSK = top_k(ops.stop_gradient(routing.probabilities), self.k)
            loss = losses.sequence_balancing(routing.probabilities, expert_index_GSK, routing.mask)
            result.append(self.sequence_balancing_weight * loss)
        return result

    def get_config(self):
        return {
            **super().get_config(),
            "score_function": self.score_function,
            "bias_update_rate": self.bias_update_rate,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
            "group_score": self.group_score,
            "scale": self.scale,
            "sequence_balancing_weight": self.sequence_balancing_weight,
        }
