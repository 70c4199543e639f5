"""The dense gate of 1991. Letters as in `base.py`."""

import keras
from keras import ops

from keras_moe.routing.base import Router, Routing, layer_options


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftmaxRouter(Router):
    """Every token goes to every expert, weighted by a softmax: a mixture that is dense.

    The gating network of Jacobs, Jordan, Nowlan and Hinton 1991 (Neural Computation 3:79-87), one
    linear layer, which starts with equal proportions, though the paper's has a bias and this one
    not; also Eq. 2 of Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538). Nothing is dropped
    and all experts carry the same load, at the price of all of them.

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: see `Router`; zeros here.
        seed: see `Router`.

    Call arguments:
        inputs: `[groups, tokens, dim]` tensor.
        mask: `[groups, tokens]` booleans, `False` for padding.
        training: boolean.
        compact: boolean, without effect: no slot is empty but those of padding.

    Returns:
        A `Routing`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_experts=None,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer="zeros",
        seed=None,
        **kwargs,
    ):
        super().__init__(
            num_experts,
            jitter=jitter,
            router_z_weight=router_z_weight,
            kernel_initializer=kernel_initializer,
            seed=seed,
            **layer_options(self, kwargs),
        )

    def call(self, inputs, mask=None, training=False, compact=False):
        logits_GSE, probabilities_GSE = self.score(inputs, mask, training)
        groups, tokens, num_experts = ops.shape(probabilities_GSE)
        token_S = ops.arange(tokens, dtype="int32")
        expert_E = ops.arange(num_experts, dtype="int32")
        token_GES = ops.broadcast_to(token_S, (groups, num_experts, tokens))
        slot_GSE = ops.broadcast_to(
            expert_E * tokens + token_S[:, None], (groups, tokens, num_experts)
        )
        expert_GSE = ops.broadcast_to(expert_E, (groups, tokens, num_experts))
        weight_GES = ops.transpose(probabilities_GSE, (0, 2, 1))
        if mask is not None:
            token_GES = ops.where(mask[:, None, :], token_GES, tokens)
            weight_GES = ops.where(mask[:, None, :], weight_GES, 0.0)
            slot_GSE = ops.where(mask[:, :, None], slot_GSE, num_experts * tokens)
            expert_GSE = ops.where(mask[:, :, None], expert_GSE, num_experts)
        return Routing(
            token_GES,
            weight_GES,
            slot_GSE,
            None,
            expert_GSE,
            logits_GSE,
            probabilities_GSE,
            mask,
        )

    def get_config(self):
        config = super().get_config()
        del config["capacity_factor"], config["eval_capacity_factor"]
        return config
