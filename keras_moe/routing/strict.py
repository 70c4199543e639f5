"""The strictly balanced gate of 2017. Letters as in `base.py`; T tokens in all, M slots in all."""

import keras
from keras import ops

from keras_moe import losses
from keras_moe.ops import add_rows, take_rows
from keras_moe.routing.base import layer_options
from keras_moe.routing.expert_choice import ExpertChoiceRouter
from keras_moe.slots import pool_tokens


@keras.saving.register_keras_serializable(package="keras_moe")
class StrictlyBalancedRouter(ExpertChoiceRouter):
    """Every expert takes its best tokens while training, and learns whom to take in inference.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), App. F. While training each of the `n`
    experts keeps the tokens of its `m = k * tokens / n` largest scores in the group (Eq. 18). In
    inference it takes the tokens whose score is above its threshold (Eq. 19), each by itself, so
    that generation is causal and independent of the batch. The thresholds are a weight, taught by
    `keras_moe.losses.batchwise_threshold` (Eq. 20), whose gradient stops at them: at the scores it
    would draw them to the threshold, where the choice is least certain. So that loss needs no
    weight of its own. They start at 0 and refuse nobody until they have learnt; weight decay would
    pull them back there: `optimizer.exclude_from_weight_decay(var_names=["threshold"])`.

    A token's weights are its scores, divided by their sum over the experts that took it (Eq. 16),
    and it is zero where none did. An `ExpertChoiceRouter` with `inference="threshold"` does not
    divide, and its thresholds are running means.

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: mean number of experts per token while training, the paper's `k`. Padding
            counts as tokens: where there is some, the others get more experts each.
        max_experts_per_token: most experts that may share a token. `None`: any number while
            training, and in inference twice the capacity factor, rounded up; the number of experts:
            any number in both, as in the paper.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: see `Router`.
        seed: see `Router`.

    Call arguments, returns and raises: as `ExpertChoiceRouter`.
    """

    def __init__(
        self,
        num_experts=None,
        capacity_factor=2.0,
        max_experts_per_token=None,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            num_experts,
            capacity_factor,
            max_experts_per_token=max_experts_per_token,
            jitter=jitter,
            router_z_weight=router_z_weight,
            kernel_initializer=kernel_initializer,
            seed=seed,
            **layer_options(self, kwargs),
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.threshold = self.add_weight(
            name="threshold",
            shape=(self.num_experts,),
            initializer="zeros",  # every score is above
        )

    @property
    def is_causal(self):
        return True

    @property
    def one_row_per_expert(self):
        return False

    def call(self, inputs, mask=None, training=False, compact=False):
        scores = self.score(inputs, mask, training)
        if training:
            routing = self.route_the_best(self.capacity_factor, *scores, mask)
        else:
            routing = self.route_each_alone(scores[1] > self.threshold, *scores, mask)
        return routing._replace(weight=_normalize(routing, *ops.shape(inputs)[:2]))

    def auxiliary_losses(self, routing):
        result = super().auxiliary_losses(routing)
        if routing.slot_index is None:  # the experts chose: there is something to learn
            scores_GSE = ops.stop_gradient(routing.probabilities)
            loss = losses.batchwise_threshold(
                scores_GSE, routing.token_index, self.threshold, routing.mask
            )
            result.append(loss)
        return result

    def get_config(self):
        config = super().get_config()
        fixed = ("eval_capacity_factor", "linear_programme", "inference", "threshold_momentum")
        for name in fixed:
            del config[name]
        return config


def _normalize(routing, groups, tokens):
    """The weights, divided by their sum over the slots of the same token."""
    token_GRC = pool_tokens(routing.token_index, groups, tokens)
    weight_M1 = ops.reshape(routing.weight, (-1, 1))
    total_T1 = add_rows(weight_M1, ops.reshape(token_GRC, (-1,)), groups * tokens)
    total_GRC = take_rows(total_T1, token_GRC)[..., 0]
    # An empty slot has 0 / 0, and so have scores too small for float32; the gradient needs a square
    # of the divisor that is not 0.
    return routing.weight / ops.maximum(total_GRC, 1e-15)
