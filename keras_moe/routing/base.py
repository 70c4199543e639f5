"""A router's decision as plain tensors, and what all routers have in common.

G groups, S tokens per group, D width, E experts, K experts per token, R rows of slots, C slots per
row (see `slots.py`). Logits, softmax and selection are float32 under every dtype policy, the
selective precision of Switch Transformers (https://arxiv.org/abs/2101.03961), section 2.4.
"""

import contextlib
import contextvars
from numbers import Integral, Real
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import losses, slots
from keras_moe.distribution.active import by_groups, gathered, seats_for_all
from keras_moe.ops import uniform


class Routing(NamedTuple):
    """A router's decision; losses, dispatch and metrics are functions of this data alone."""

    token_index: Any  # [G, R, C] the token in each slot, counted within its group; S where empty
    weight: Any  # [G, R, C] float32, what the slot's output is multiplied by; 0 where empty
    slot_index: Any  # [G, S, K] the slot r*C + c of each choice; R*C dropped; None: experts chose
    row_expert: Any  # [R] the expert of each row, E: nobody's; None when row e is expert e's
    expert_index: Any  # [G, S, K] the chosen experts, before dropping; E for padding; None as above
    logits: Any  # [G, S, E] float32; None: the router computes none
    probabilities: Any  # [G, S, E] float32
    mask: Any  # [G, S] booleans, False for padding; None when there is none
    clean_logits: Any = None  # [G, S, E] float32, the logits without noise; None: there is no noise
    noise_scale: Any = None  # [G, S, E] float32, the noise's standard deviation; None: not needed
    secondary: Any = None  # the second level of a hierarchical gate; see `hierarchical.py`


_drops = contextvars.ContextVar("drops", default=True)


@contextlib.contextmanager
def dropping_nothing():
    """Within, tokens that choose their experts are all seated in inference."""
    token = _drops.set(False)
    try:
        yield
    finally:
        _drops.reset(token)


def eval_drops():
    """Whether routers have their capacity in inference: not within `dropping_nothing`."""
    return _drops.get()


def seat_choices(
    expert_index_GSK, weight_GSK, num_experts, capacity=None, compact=False, confidence_GS=None
):
    """Seats the tokens' choices: the first four fields of a `Routing`.

    Args:
        expert_index_GSK: `[groups, tokens, k]` integers; `num_experts` marks padding.
        weight_GSK: `[groups, tokens, k]` float32 weights.
        num_experts: integer.
        capacity: slots per expert and group; `None` seats every choice.
        compact: whether experts get as many rows as they need, the groups pooled, with a capacity
            too; without one they always do.
        confidence_GS: `[groups, tokens]`, by which the tokens are seated, see
            `slots.by_confidence`; `None`: in token order, all choices of one before the next's.

    Returns:
        Tuple `(token_index, weight, slot_index, row_expert)`.
    """
    _, tokens, k = ops.shape(expert_index_GSK)
    capacity = seats_for_all(tokens) if capacity is None else capacity
    pooled = capacity is None or compact
    prioritized = confidence_GS is not None and capacity is not None

    def seat(expert_index_GSK, weight_GSK, confidence_GS):
        groups = ops.shape(expert_index_GSK)[0]
        expert_index_GN = ops.reshape(expert_index_GSK, (groups, tokens * k))
        order_GN = slots.by_confidence(confidence_GS, k) if prioritized else None
        if pooled:
            table = slots.by_rows(expert_index_GN, num_experts, capacity, order_GN)
            weight_GN = ops.reshape(weight_GSK, (1, groups * tokens * k))
        else:
            table = slots.by_capacity(expert_index_GN, num_experts, capacity, order_GN)
            weight_GN = ops.reshape(weight_GSK, (groups, tokens * k))
        weight_GRC = slots.look_up(weight_GN, table.assignment_index)
        slot_index_GSK = ops.reshape(table.slot_index, (groups, tokens, k))
        return table.assignment_index // k, weight_GRC, slot_index_GSK, table.row_expert

    choices = (expert_index_GSK, weight_GSK, confidence_GS)
    return seat(*choices) if pooled else by_groups(seat, *choices)


def positive_integer(name, value, optional=False):
    """Raises a ValueError unless `value` is an integer from 1 on, or `None` where it may be."""
    fits = isinstance(value, Integral) and value >= 1
    _check(name, value, fits, "a positive integer", optional)


def positive_number(name, value, optional=False):
    """Raises a ValueError unless `value` is a number above 0, or `None` where it may be."""
    fits = isinstance(value, Real) and value > 0
    _check(name, value, fits, "a positive number", optional)


def not_negative(name, value, kind=Real, optional=False):
    """Raises a ValueError unless `value` is a number (`Integral`: an integer) from 0 on."""
    fits = isinstance(value, kind) and value >= 0
    allowed = "0, " if optional else "0 or "
    allowed += "a positive " + ("integer" if kind is Integral else "number")
    _check(name, value, fits, allowed, optional)


def _check(name, value, fits, allowed, optional=False):
    if optional and value is None or fits:
        return
    allowed += " or None" if optional else ""
    raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}")


def layer_options(router, options):
    """`options` of a router, none of them but a layer's own; its parents have others, fixed here.

    Raises:
        ValueError: if there are others.
    """
    if unknown := sorted(set(options) - {"name", "dtype", "trainable"}):
        raise ValueError(
            f"Unrecognized keyword arguments passed to {type(router).__name__}: "
            f"{', '.join(unknown)}"
        )
    return options


class Router(keras.layers.Layer):
    """Base of all routers: one linear layer without bias, its weight named `kernel`.

    A router with `needs_token_ids` is called with `token_ids`, `[groups, tokens]` integers, too.

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

    needs_token_ids = False

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
        if num_experts is not None:
            positive_integer("num_experts", num_experts)
        not_negative("capacity_factor", capacity_factor, optional=True)
        not_negative("eval_capacity_factor", eval_capacity_factor, optional=True)
        not_negative("router_z_weight", router_z_weight)
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
        self.add_kernel(input_shape[-1])

    def add_kernel(self, dim):
        """Makes the weight that `score` multiplies tokens of width `dim` with."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(dim, self.num_logits),
            initializer=self.kernel_initializer,
        )

    @property
    def num_logits(self):
        """Width of the kernel: one logit per expert, unless experts are chosen in two levels."""
        return self.num_experts

    def score(self, inputs, mask=None, training=False):
        """Logits and their softmax over experts, `[groups, tokens, experts]` float32 each."""
        logits = gathered(ops.matmul(self.prepare(inputs, mask, training), self.kernel))
        return logits, ops.softmax(logits, axis=-1)

    def prepare(self, inputs, mask=None, training=False):
        """The inputs as the router sees them: float32, zeros for padding, with jitter."""
        inputs = ops.cast(inputs, "float32")
        if mask is not None:  # whatever stands there, or its gradient would be NaN where it is
            inputs = ops.where(ops.expand_dims(mask, -1), inputs, 0.0)
        if training and self.jitter > 0:
            low, high = 1.0 - self.jitter, 1.0 + self.jitter
            # Drawn whole, the noise does not depend on the devices.
            noise = gathered(uniform(ops.shape(inputs), low, high, self.seed_generator))
            inputs = inputs * noise
        return inputs

    @property
    def experts_per_token(self):
        """Experts that a token gets, or would get if none were full; their mean, if it varies."""
        return self.num_experts

    @property
    def is_causal(self):
        """Whether no token is routed by what comes after it in its group, in inference."""
        return True

    @property
    def one_row_per_expert(self):
        """Whether row `e` of the slots is expert `e`'s, in training and in inference."""
        return True

    def capacity_of(self, tokens):
        """Slots per expert in inference, for a group of so many tokens; `None`: no limit."""
        return None

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
