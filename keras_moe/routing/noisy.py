"""The noisy top-k gate of 2017. Letters as in `base.py`."""

import keras
from keras import ops

from keras_moe import losses
from keras_moe.ops import normal, take_entries, top_k
from keras_moe.routing.base import layer_options, not_negative
from keras_moe.routing.token_choice import TopKRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class NoisyTopKRouter(TopKRouter):
    """Every token goes to the `k` experts of its largest logits, to which it adds learnt noise.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), section 2.1 and appendix A.
    `H = x kernel + normal * softplus(x noise_kernel)` while training, and the weights are the
    softmax over the `k` largest entries of `H` (Eqs. 3-5). Both kernels start at zero, so that at
    first the noise alone spreads the tokens over the experts. Without noise, in inference, equal
    logits are told apart by the token's place in its group: a gate that has learnt nothing sends
    the first token to experts 0, 1, ..., the next to 1, 2, ..., and not all of them to expert 0.

    Two losses keep the experts busy: `keras_moe.losses.importance` (Eqs. 6-7) and
    `keras_moe.losses.load` (Eqs. 8-11). The paper weighs both with 0.1 in language models, and
    with 0.01 in translation.

    Args:
        k: experts per token; the paper's gate learns from the task for `k > 1` only. With `k=1` the
            weight is the raw probability, as in `TopKRouter`.
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        capacity_factor: slots per expert, relative to `k * tokens / num_experts`, while training;
            `None` (the paper) drops nothing.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group.
        importance_weight: weight of `keras_moe.losses.importance`.
        load_weight: weight of `keras_moe.losses.load`.
        jitter: see `Router`.
        router_z_weight: weight of `keras_moe.losses.router_z`.
        kernel_initializer: initializer of the `[dim, num_experts]` kernel.
        noise_initializer: initializer of the `[dim, num_experts]` noise kernel.
        seed: integer, seed of the noise and the jitter.

    Call arguments, returns and raises: as `TopKRouter`.
    """

    def __init__(
        self,
        k,
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
        not_negative("importance_weight", importance_weight)
        not_negative("load_weight", load_weight)
        super().__init__(
            k,
            num_experts,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            load_balancing_weight=0.0,
            jitter=jitter,
            router_z_weight=router_z_weight,
            kernel_initializer=kernel_initializer,
            seed=seed,
            **layer_options(self, kwargs),
        )
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        self.noise_initializer = keras.initializers.get(noise_initializer)

    def build(self, input_shape):
        super().build(input_shape)
        self.noise_kernel = self.add_weight(
            name="noise_kernel",
            shape=(input_shape[-1], self.num_logits),
            initializer=self.noise_initializer,
        )

    def call(self, inputs, mask=None, training=False, compact=False):
        inputs = self.prepare(inputs, mask, training)
        clean_GSE, scale_GSE = ops.matmul(inputs, self.kernel), None
        if self.needs_noise_scale(training):
            scale_GSE = ops.softplus(ops.matmul(inputs, self.noise_kernel))
        logits_GSE = self.add_noise(clean_GSE, scale_GSE, training)
        probabilities_GSE = ops.softmax(logits_GSE, axis=-1)
        routing = self.route(logits_GSE, probabilities_GSE, mask, training, compact)
        return routing._replace(clean_logits=clean_GSE, noise_scale=scale_GSE)

    def needs_noise_scale(self, training):
        """Whether the noise is drawn, or the load loss asks how large it would be."""
        return training or self.load_weight != 0

    def add_noise(self, logits, scale, training):
        """Eq. 4, while training."""
        if not training:
            return logits
        return logits + normal(ops.shape(logits), self.seed_generator) * scale

    def choose(self, probabilities_GSE, training):
        if training:  # the noise leaves no ties
            return super().choose(probabilities_GSE, training)
        first_S1 = ops.arange(ops.shape(probabilities_GSE)[1], dtype="int32")[:, None]
        return top_k_in_turn(probabilities_GSE, self.k, first_S1)

    def auxiliary_losses(self, routing):
        result = super().auxiliary_losses(routing)
        if self.importance_weight != 0:
            result.append(self.importance_weight * self.importance(routing))
        if self.load_weight != 0:
            result.append(self.load_weight * self.load(routing))
        return result

    def importance(self, routing):
        """The importance loss, without its weight."""
        return losses.importance(self._gates(routing), routing.mask)

    def load(self, routing):
        """The load loss, without its weight."""
        return losses.load(
            routing.clean_logits, routing.logits, routing.noise_scale, self.k, routing.mask
        )

    def _gates(self, routing):
        """`G(x)` of Eq. 3, `[groups, tokens, experts]`, before anything is dropped."""
        # Padding has chosen expert E; with another one its gates are no 0 / 0, and do not count.
        chosen_GSK1 = ops.minimum(routing.expert_index, self.num_experts - 1)[..., None]
        is_chosen_GSE = ops.any(chosen_GSK1 == ops.arange(self.num_experts, dtype="int32"), axis=2)
        gates_GSE = ops.where(is_chosen_GSE, routing.probabilities, 0.0)
        if self.k == 1:
            return gates_GSE
        return gates_GSE / ops.sum(gates_GSE, axis=-1, keepdims=True)

    def get_config(self):
        config = super().get_config()
        del config["priority"], config["normalize"], config["load_balancing_weight"]
        return {
            **config,
            "importance_weight": self.importance_weight,
            "load_weight": self.load_weight,
            "noise_initializer": keras.initializers.serialize(self.noise_initializer),
        }


def top_k_in_turn(x, k, first):
    """`top_k`, but of equal entries those come first that stand at `first` or next after it.

    Args:
        x: `[..., n]` tensor.
        k: integer.
        first: `[..., 1]` integers that broadcast to `x`; the order goes on from the start at `n`.

    Returns:
        Tuple of values and int32 positions, both `[..., k]`, in descending order.
    """
    n = x.shape[-1]
    turned = (first + ops.arange(n, dtype="int32")) % n
    values, place = top_k(take_entries(x, ops.broadcast_to(turned, ops.shape(x)), axis=-1), k)
    return values, (first + place) % n
