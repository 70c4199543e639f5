"""The adaptive mixture of 1991: its loss, and the pure functions that go with it.

A model has one output, so what the experts and the gate say travels as one packed tensor
`[..., experts, outputs + 1]`, whose last column is the gate's logits. All in float32.

E experts, O outputs of an expert; before them any axes, `...`.

Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive Mixtures of Local Experts", Neural Computation
3:79-87, https://doi.org/10.1162/neco.1991.3.1.79.
"""

import keras
from keras import ops

FORMS = ("mixture", "cooperative", "competitive", "classification")


def pack(outputs, gate_logits):
    """What the experts and the gate say, as one tensor.

    Args:
        outputs: `[..., experts, outputs]`, the outputs of every expert.
        gate_logits: `[..., experts]`, their softmax is the gate's proportions.

    Returns:
        `[..., experts, outputs + 1]` float32 tensor.
    """
    outputs, gate_logits = (ops.cast(x, "float32") for x in (outputs, gate_logits))
    return ops.concatenate([outputs, gate_logits[..., None]], axis=-1)


def unpack(packed):
    """The tuple `(outputs, gate_logits)` that was packed; see `pack`."""
    return packed[..., :-1], packed[..., -1]


def blend(packed, classification=False):
    """The mixture's prediction, `sum_i p_i o_i`, whichever loss it was trained with.

    Args:
        packed: see `pack`.
        classification: whether the experts' outputs are class logits; their class probabilities
            are what is blended then.

    Returns:
        `[..., outputs]` float32 tensor.
    """
    outputs, gate_logits = unpack(ops.cast(packed, "float32"))
    if classification:
        outputs = ops.softmax(outputs)
    return ops.einsum("...e,...eo->...o", ops.softmax(gate_logits), outputs)


def responsibilities(y_true, packed, classification=False):
    """How probable it is that each expert made the target: `h_i` of Eq. 5.

        h_i = p_i exp(-|d - o_i|^2 / 2) / sum_j p_j exp(-|d - o_j|^2 / 2)

    The gradient of Eq. 3 is `-h_i (d - o_i)` in an expert's output and `p_i - h_i` in its gate
    logit. With class logits `P_i(y | x)` takes the place of the exponential.

    Args:
        y_true: targets, as `MixtureOfExpertsLoss` takes them.
        packed: see `pack`.
        classification: whether the experts' outputs are class logits.

    Returns:
        `[..., experts]` float32 tensor that sums to 1.
    """
    return ops.softmax(_log_joint(y_true, packed, classification))


@keras.saving.register_keras_serializable(package="keras_moe")
class MixtureOfExpertsLoss(keras.losses.Loss):
    """The loss of an adaptive mixture, for `model.compile(loss=...)`.

    The model's output is one packed tensor, see `keras_moe.losses.pack`; `zoo.adaptive_mixture`
    makes such a model. With targets `d`, experts' outputs `o_i` and the gate's proportions `p_i`:

    * "mixture": `-log sum_i p_i exp(-|d - o_i|^2 / 2)`, Eq. 3, which the paper uses;
    * "cooperative": `|d - sum_i p_i o_i|^2`, Eq. 1, where experts make up for each other;
    * "competitive": `sum_i p_i |d - o_i|^2`, Eq. 2, where each is to be right alone;
    * "classification": `-log sum_i p_i P_i(y | x)`, Eq. 3 with distributions over classes.

    Eqs. 1 and 2 lack the factor 1/2 of Eq. 3: the same step size goes twice as far with them.
    Classification is not written out in the paper, which only says that experts may give
    distributions over classes. Here they give logits: the loss then stays finite, and has a
    gradient, where a probability is too small for a float.

    Source: Jacobs, Jordan, Nowlan and Hinton 1991, Neural Computation 3:79-87,
    https://doi.org/10.1162/neco.1991.3.1.79.

    Example:

    ```python
    model = zoo.adaptive_mixture(experts=4, output_dim=2)
    model.compile("sgd", keras_moe.losses.MixtureOfExpertsLoss(), metrics=["mse"])
    model.fit(x, y)  # [batch, dim], [batch, 2]
    ```

    Args:
        form: "mixture", "cooperative", "competitive" or "classification".
        reduction: see `keras.losses.Loss`; a loss is one per entry of the batch, summed over the
            outputs.
        name: see `keras.losses.Loss`.

    Call arguments:
        y_true: `[..., outputs]` tensor, or `[...]` if there is one output; for classification
            class numbers, `[...]` or `[..., 1]`.
        y_pred: `[..., experts, outputs + 1]` packed tensor.
        sample_weight: see `keras.losses.Loss`.

    Returns:
        A scalar, unless `reduction` is `None`.

    Raises:
        ValueError: if there is no such form, or the targets do not fit the outputs.
    """

    def __init__(
        self, form="mixture", reduction="sum_over_batch_size", name="mixture_of_experts_loss"
    ):
        super().__init__(name=name, reduction=reduction, dtype="float32")
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}. Received: form={form!r}")
        self.form = form

    def call(self, y_true, y_pred):
        if self.form in ("mixture", "classification"):
            log_joint_E = _log_joint(y_true, y_pred, self.form == "classification")
            return -ops.logsumexp(log_joint_E, axis=-1)
        outputs_EO, gate_logits_E = unpack(y_pred)
        target_1O = _target(y_true, outputs_EO)
        if self.form == "cooperative":
            return ops.sum(ops.square(target_1O[..., 0, :] - blend(y_pred)), axis=-1)
        return ops.sum(ops.softmax(gate_logits_E) * _distance(target_1O, outputs_EO), axis=-1)

    def get_config(self):
        return {**super().get_config(), "form": self.form}


def _log_joint(y_true, packed, classification):
    """`log p_i + log P_i(y)`, `[..., experts]`; Gaussians of unit variance lack their constant."""
    outputs_EO, gate_logits_E = unpack(ops.cast(packed, "float32"))
    if classification:
        log_likelihood_E = _log_probability(y_true, outputs_EO)
    else:
        log_likelihood_E = -0.5 * _distance(_target(y_true, outputs_EO), outputs_EO)
    return ops.log_softmax(gate_logits_E) + log_likelihood_E


def _distance(target_1O, outputs_EO):
    """`|d - o_i|^2`, `[..., experts]`."""
    return ops.sum(ops.square(target_1O - outputs_EO), axis=-1)


def _target(y_true, outputs_EO):
    """The targets beside the outputs of every expert, `[..., 1, outputs]`."""
    y_true = ops.cast(y_true, "float32")
    if len(y_true.shape) == len(outputs_EO.shape) - 2:
        y_true = y_true[..., None]
    if len(y_true.shape) != len(outputs_EO.shape) - 1 or y_true.shape[-1] != outputs_EO.shape[-1]:
        raise ValueError(
            f"`y_true` must be [..., {outputs_EO.shape[-1]}], as the experts' outputs are. "
            f"Received: y_true of shape {tuple(y_true.shape)}, outputs of shape "
            f"{tuple(outputs_EO.shape)}"
        )
    return y_true[..., None, :]


def _log_probability(y_true, outputs_EO):
    """`log P_i(y | x)`, `[..., experts]`, of the class that each entry belongs to."""
    if len(y_true.shape) == len(outputs_EO.shape) - 1 and y_true.shape[-1] == 1:
        y_true = y_true[..., 0]
    if len(y_true.shape) != len(outputs_EO.shape) - 2:
        raise ValueError(
            "`y_true` must be class numbers, [...] or [..., 1], for form='classification'. "
            f"Received: y_true of shape {tuple(y_true.shape)}, outputs of shape "
            f"{tuple(outputs_EO.shape)}"
        )
    label_11 = ops.cast(y_true, "int32")[..., None, None]
    is_label_1O = label_11 == ops.arange(outputs_EO.shape[-1], dtype="int32")
    log_p_E = ops.sum(ops.where(is_label_1O, ops.log_softmax(outputs_EO), 0.0), axis=-1)
    return ops.where(ops.any(is_label_1O, axis=-1), log_p_E, float("nan"))  # no such class
