"""Experts in groups and two levels of gates: a token chooses groups, then experts within each.

Letters as in `routing/base.py`, and: A groups of experts (G are groups of tokens), B experts in
each, so that E = A*B and expert `i*B + j` is the `j`-th of group `i`; K groups per token and P
experts per token and chosen group; N = S*K choices of groups.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import losses
from keras_moe.dispatch import combine, dispatch
from keras_moe.moe import MixtureOfExperts
from keras_moe.ops import expert_product, top_k
from keras_moe.routing import NoisyTopKRouter, Routing, seat_choices
from keras_moe.routing.base import layer_options, positive_integer
from keras_moe.routing.noisy import top_k_in_turn


class SecondaryGates(NamedTuple):
    """The gates of the groups that each token chose; float32."""

    logits: Any  # [G, S, K, B]
    clean_logits: Any  # [G, S, K, B], the logits without noise
    noise_scale: Any  # [G, S, K, B], the standard deviation of the noise; None as in `Routing`
    weight: Any  # [G, S, K*P] both levels' weights multiplied, before anything is dropped


@keras.saving.register_keras_serializable(package="keras_moe")
class HierarchicalRouter(NoisyTopKRouter):
    """Every token goes to `k` groups of experts, and to `secondary_k` experts in each of them.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), appendix B. A primary gate chooses among
    the groups, and each group has a gate of its own that chooses among its experts; all are noisy
    top-k gates (Eqs. 3-5, see `NoisyTopKRouter`). An expert's weight is the product of the two
    gates' weights (Eq. 12). In all else this is a flat router: a capacity, for one, is that of a
    single expert.

    A group's gate is computed for the tokens that chose the group, and for no others. A token costs
    `dim * (num_groups + k * num_experts / num_groups)` multiplications, twice with those of the
    noise, and not `dim * num_experts`. For the same reason there is no logit of every expert. Of
    the `Routing`, `logits`, `clean_logits` and `noise_scale` are the primary gate's, `secondary`
    holds the same of the chosen groups' gates, and `probabilities`, `[groups, tokens, k *
    group_size]`, are those of the experts in the chosen groups, which the entropy among the metrics
    is of.

    Two losses keep all experts busy: `keras_moe.losses.hierarchical_importance` (Eq. 13) and
    `keras_moe.losses.hierarchical_load` (Eq. 14).

    Args:
        num_groups: groups of experts, of equal size; must divide the number of experts.
        k: groups per token. Where a level has one choice, its weight is the raw probability, as in
            `TopKRouter`.
        secondary_k: experts per token and chosen group.
        num_experts: integer, of all groups together; may be left to the `MixtureOfExperts` that
            takes the router.
        capacity_factor: slots per expert, relative to `k * secondary_k * tokens / num_experts`,
            while training; `None` (the paper) drops nothing.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group of tokens.
        importance_weight: weight of `keras_moe.losses.hierarchical_importance`.
        load_weight: weight of `keras_moe.losses.hierarchical_load`.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z` of the primary gate plus that of the
            chosen groups' gates.
        kernel_initializer: initializer of the `[dim, num_groups]` kernel and of the
            `[num_groups, dim, group_size]` secondary kernel.
        noise_initializer: initializer of the noise kernels, which are of the same shapes.
        seed: integer, seed of the noise and the jitter.

    Call arguments, returns and raises: as `TopKRouter`.
    """

    def __init__(
        self,
        num_groups,
        k=2,
        secondary_k=2,
        num_experts=None,
        capacity_factor=None,
        eval_capacity_factor=None,
        min_capacity=4,
        importance_weight=0.1,
        load_weight=0.1,
        jitter=0.0,
        router_z_weight=0.0,
        kernel_initializer="zeros",
        noise_initializer="zeros",
        seed=None,
        **kwargs,
    ):
        positive_integer("num_groups", num_groups)
        positive_integer("k", k)
        positive_integer("secondary_k", secondary_k)
        if k > num_groups:
            raise ValueError(
                f"`k` must be at most `num_groups`. Received: k={k}, num_groups={num_groups}"
            )
        super().__init__(
            k,
            None,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            importance_weight,
            load_weight,
            jitter,
            router_z_weight,
            kernel_initializer,
            noise_initializer,
            seed,
            **layer_options(self, kwargs),
        )
        self.num_groups = num_groups
        self.secondary_k = secondary_k
        if num_experts is not None:
            self.set_num_experts(num_experts)

    def set_num_experts(self, num_experts):
        if num_experts < 1 or num_experts % self.num_groups:
            raise ValueError(
                "`num_groups` must divide the number of experts. "
                f"Received: num_groups={self.num_groups} for num_experts={num_experts}"
            )
        if self.secondary_k > num_experts // self.num_groups:
            raise ValueError(
                "`secondary_k` must be at most the number of experts in a group. "
                f"Received: secondary_k={self.secondary_k} for num_experts={num_experts} "
                f"in num_groups={self.num_groups}"
            )
        super().set_num_experts(num_experts)

    @property
    def num_logits(self):
        return self.num_groups

    @property
    def experts_per_token(self):
        return self.k * self.secondary_k

    @property
    def group_size(self):
        """Experts in a group."""
        return self.num_experts // self.num_groups

    def build(self, input_shape):
        super().build(input_shape)
        shape = (self.num_groups, input_shape[-1], self.group_size)
        self.secondary_kernel = self.add_weight(
            name="secondary_kernel", shape=shape, initializer=self.kernel_initializer
        )
        self.secondary_noise_kernel = self.add_weight(
            name="secondary_noise_kernel", shape=shape, initializer=self.noise_initializer
        )
        for kernel in (self.secondary_kernel, self.secondary_noise_kernel):
            kernel.per_expert = True  # here, per group: see `keras_moe.optimizers`

    def call(self, inputs, mask=None, training=False, compact=False):
        x_GSD = self.prepare(inputs, mask, training)
        clean_GSA, scale_GSA = ops.matmul(x_GSD, self.kernel), None
        needs_scale = self.needs_noise_scale(training)
        if needs_scale:
            scale_GSA = ops.softplus(ops.matmul(x_GSD, self.noise_kernel))
        logits_GSA = self.add_noise(clean_GSA, scale_GSA, training)
        gate_GSK, group_GSK = self.choose(ops.softmax(logits_GSA, axis=-1), training)
        share_GSK = gate_GSK / ops.sum(gate_GSK, axis=-1, keepdims=True)
        gate_GSK = share_GSK if self.k > 1 else gate_GSK
        if mask is not None:
            group_GSK = ops.where(mask[:, :, None], group_GSK, self.num_groups)

        score_within = self._scores_of_groups(x_GSD, group_GSK)
        clean_GSKB, scale_GSKB = score_within(self.secondary_kernel), None
        if needs_scale:
            scale_GSKB = ops.softplus(score_within(self.secondary_noise_kernel))
        logits_GSKB = self.add_noise(clean_GSKB, scale_GSKB, training)
        p_GSKB = ops.softmax(logits_GSKB, axis=-1)
        gate_GSKP, member_GSKP = self._choose_within(p_GSKB, training)
        if self.secondary_k > 1:
            gate_GSKP = gate_GSKP / ops.sum(gate_GSKP, axis=-1, keepdims=True)

        def of_choices(x_GSKP, width):
            groups, tokens = ops.shape(x_GSD)[:2]
            return ops.reshape(x_GSKP, (groups, tokens, self.k * width))

        weight_GSN = of_choices(gate_GSK[..., None] * gate_GSKP, self.secondary_k)
        expert_GSKP = group_GSK[..., None] * self.group_size + member_GSKP
        expert_GSKP = ops.minimum(expert_GSKP, self.num_experts)  # padding
        expert_GSN = of_choices(expert_GSKP, self.secondary_k)
        _, tokens, choices = ops.shape(expert_GSN)
        seating = self.seating(tokens, choices, training, compact)
        return Routing(
            *seat_choices(expert_GSN, weight_GSN, self.num_experts, *seating),
            expert_index=expert_GSN,
            logits=logits_GSA,
            probabilities=of_choices(share_GSK[..., None] * p_GSKB, self.group_size),
            mask=mask,
            clean_logits=clean_GSA,
            noise_scale=scale_GSA,
            secondary=SecondaryGates(logits_GSKB, clean_GSKB, scale_GSKB, weight_GSN),
        )

    def capacity_of(self, tokens):
        return self._capacity(tokens, self.k * self.secondary_k, training=False)[0]

    def _scores_of_groups(self, x_GSD, group_GSK):
        """A function of a kernel `[A, dim, B]`: tokens times those of their chosen groups."""
        groups, tokens, k = ops.shape(group_GSK)
        group_GN1 = ops.reshape(group_GSK, (groups, tokens * k, 1))
        seats = seat_choices(group_GN1, ops.ones_like(group_GN1, "float32"), self.num_groups)
        choices = Routing(*seats, None, None, None, None)
        x_RCD = dispatch(
            x_GSD,
            choices._replace(
                token_index=choices.token_index // k,
                slot_index=ops.reshape(choices.slot_index, (groups, tokens, k)),
            ),
        )

        def score(kernel_ADB):
            y_RCB = expert_product(x_RCD, kernel_ADB, choices.row_expert)
            y_GNB = combine(y_RCB, choices, groups, tokens * k)
            return ops.reshape(y_GNB, (groups, tokens, k, self.group_size))

        return score

    def _choose_within(self, p_GSKB, training):
        if training:
            return top_k(p_GSKB, self.secondary_k)
        # Ties: gates that have learnt nothing go through the groups, then to their next experts.
        round_S = ops.arange(ops.shape(p_GSKB)[1], dtype="int32") // self.num_groups
        return top_k_in_turn(p_GSKB, self.secondary_k, round_S[:, None, None])

    def auxiliary_losses(self, routing):
        result = super().auxiliary_losses(routing)
        if self.router_z_weight != 0:
            logits_GSKB, mask_GSK = routing.secondary.logits, None
            if routing.mask is not None:
                mask_GSK = ops.broadcast_to(routing.mask[..., None], ops.shape(logits_GSKB)[:3])
            result.append(self.router_z_weight * losses.router_z(logits_GSKB, mask_GSK))
        return result

    def importance(self, routing):
        return losses.hierarchical_importance(
            routing.secondary.weight, routing.expert_index, self.num_experts, routing.mask
        )

    def load(self, routing):
        secondary = routing.secondary
        return losses.hierarchical_load(
            (routing.clean_logits, routing.logits, routing.noise_scale),
            (secondary.clean_logits, secondary.logits, secondary.noise_scale),
            routing.expert_index[..., :: self.secondary_k] // self.group_size,
            self.secondary_k,
            routing.mask,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "num_groups": self.num_groups,
            "secondary_k": self.secondary_k,
        }


def HierarchicalMoE(
    experts, num_groups, k=2, secondary_k=2, group="sequence", name=None, dtype=None, **options
):
    """A `MixtureOfExperts` with a `HierarchicalRouter`: experts in groups, two levels of gates.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), appendix B:
    `y = sum_i sum_j G(x)_i * G_i(x)_j * E_ij(x)` (Eq. 12), where `E_ij` is expert
    `i * group_size + j` of the bank. The paper uses it from 256 experts on, with `k = 2` on both
    levels and 16 groups.

    Example:

    ```python
    experts = keras_moe.FeedForwardExperts(num_experts=256, hidden_dim=1024)
    layer = keras_moe.HierarchicalMoE(experts, num_groups=16)
    outputs = inputs + layer(inputs)  # [batch, length, dim]
    ```

    Args:
        experts: see `MixtureOfExperts`.
        num_groups: groups of experts, of equal size; must divide the number of experts.
        k: groups per token.
        secondary_k: experts per token and chosen group.
        group: the tokens that share a capacity, see `MixtureOfExperts`.
        name: of the layer.
        dtype: dtype or dtype policy of the layer.
        **options: any other argument of `HierarchicalRouter`.

    Returns:
        A `MixtureOfExperts`.

    Raises:
        ValueError: if an argument is out of range, or `num_groups` does not divide the number of
            experts.
    """
    router = HierarchicalRouter(num_groups, k, secondary_k, **options)
    return MixtureOfExperts(experts, router, group, name=name, dtype=dtype)
