"""The adaptive mixture of local experts of 1991: any Keras models as experts, and a gate.

E experts, O outputs of an expert.
"""

import numbers

import keras
from keras import ops

from keras_moe import losses


def adaptive_mixture(experts, output_dim=1, classification=False, gate=None, name=None):
    """An adaptive mixture of local experts, to be trained with `MixtureOfExpertsLoss`.

    Every expert sees every input, and a gate, which sees it too, says in which proportions `p_i`
    their outputs `o_i` count. `predict` and the compiled metrics see the blend `sum_i p_i o_i`; the
    loss sees what each expert says, so that experts can part the inputs among themselves.

    `keras_moe.MixtureOfExperts(LayerExperts([...]), SoftmaxRouter())` computes the same blend
    inside a larger model. It hands on the blend alone, so that its experts are trained to make up
    for each other (Eq. 1), never to compete (Eqs. 2, 3).

    Source: Jacobs, Jordan, Nowlan and Hinton 1991, Neural Computation 3:79-87,
    https://doi.org/10.1162/neco.1991.3.1.79.

    Example:

    ```python
    model = zoo.adaptive_mixture(experts=4, output_dim=10, classification=True)
    loss = keras_moe.losses.MixtureOfExpertsLoss("classification")
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(x, labels)  # [batch, dim], [batch]
    model.predict(x)  # [batch, 10], probabilities
    proportions = keras.ops.softmax(keras_moe.losses.unpack(model(x))[1])  # [batch, 4]
    ```

    Args:
        experts: how many linear experts; or a list of Keras layers or models, which may differ in
            everything but the width of their outputs.
        output_dim: width of the linear experts' outputs; a list's layers have their own.
        classification: whether the experts' outputs are class logits; the blend is one of class
            probabilities then.
        gate: a Keras layer or model that gives one logit per expert. By default one linear layer,
            its kernel zero, so that proportions start equal.
        name: of the model.

    Returns:
        An `AdaptiveMixture`.

    Raises:
        ValueError: if an argument is out of range; when the model is built, if the experts' output
            widths differ, or the gate does not give one logit per expert.
    """
    if isinstance(experts, numbers.Integral):
        if experts < 1:
            raise ValueError(
                "`experts` must be a positive integer or a list of Keras layers. "
                f"Received: experts={experts}"
            )
        if output_dim < 1:
            raise ValueError(
                f"`output_dim` must be a positive integer. Received: output_dim={output_dim}"
            )
        experts = [keras.layers.Dense(output_dim, name=f"expert_{n}") for n in range(experts)]
    return AdaptiveMixture(experts, gate, classification, name=name)


@keras.saving.register_keras_serializable(package="zoo")
class AdaptiveMixture(keras.Model):
    """What `zoo.adaptive_mixture` makes, from a list of experts and a gate.

    Args:
        experts: list of Keras layers or models.
        gate: a Keras layer or model; `None`: see `zoo.adaptive_mixture`.
        classification: see `zoo.adaptive_mixture`.

    Call arguments:
        inputs: whatever the experts and the gate take.
        training: boolean.

    Returns:
        `[..., experts, outputs + 1]` float32 tensor, see `keras_moe.losses.pack`.

    Raises:
        ValueError: see `zoo.adaptive_mixture`.
    """

    def __init__(self, experts, gate=None, classification=False, **kwargs):
        # The experts and the gate cast for themselves: the default gate is float32.
        super().__init__(autocast=False, **kwargs)
        experts = list(experts)
        if not experts or not all(isinstance(expert, keras.Layer) for expert in experts):
            raise ValueError(
                f"`experts` must be a list of Keras layers, at least one. Received: {experts}"
            )
        if len({id(layer) for layer in experts}) < len(experts):
            raise ValueError("`experts` must be different objects, or they would share weights.")
        if gate is None:
            gate = keras.layers.Dense(
                len(experts), kernel_initializer="zeros", dtype="float32", name="gate"
            )
        if not isinstance(gate, keras.Layer):
            raise ValueError(f"`gate` must be a Keras layer or None. Received: gate={gate!r}")
        self.experts = experts
        self.gate = gate
        self.classification = classification
        self.supports_masking = True

    def build(self, input_shape):
        inputs = keras.tree.map_shape_structure(
            lambda shape: keras.KerasTensor(shape, self.compute_dtype), input_shape
        )
        # A symbolic call asks, and builds, layers of every kind.
        widths = [expert(inputs).shape[-1] for expert in self.experts]
        logits = self.gate(inputs).shape[-1]
        if len(set(widths)) > 1:
            raise ValueError(f"`experts` must agree in their output width. Received: {widths}")
        if logits != len(widths):
            raise ValueError(
                f"`gate` must give one logit for each of {len(widths)} experts. "
                f"Received: {logits} logits"
            )

    def call(self, inputs, training=False):
        outputs = [expert(inputs, training=training) for expert in self.experts]
        outputs_EO = ops.stack([ops.cast(output, "float32") for output in outputs], axis=-2)
        return losses.pack(outputs_EO, self.gate(inputs, training=training))

    def blend(self, packed):
        """The prediction that a packed output of the model stands for."""
        return losses.blend(packed, self.classification)

    def predict_step(self, *args):
        outputs = super().predict_step(*args)
        if isinstance(outputs, tuple):  # with the model's state, on JAX
            packed, state = outputs
            return self.blend(packed), state
        return self.blend(outputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        form = getattr(self.loss, "form", None)
        if form is not None and (form == "classification") != self.classification:
            raise ValueError(
                "`form` of the loss must be 'classification' for a mixture that classifies, and "
                "for no other. "
                f"Received: form={form!r}, a mixture with classification={self.classification}"
            )
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, self.blend(y_pred), sample_weight)

    def get_config(self):
        return {
            **super().get_config(),
            "experts": [keras.saving.serialize_keras_object(layer) for layer in self.experts],
            "gate": keras.saving.serialize_keras_object(self.gate),
            "classification": self.classification,
        }

    @classmethod
    def from_config(cls, config):
        # Not built on their own, or their weights' paths would lack this model's name.
        *experts, gate = (
            keras.saving.deserialize_keras_object({**layer, "build_config": None})
            for layer in [*config["experts"], config["gate"]]
        )
        return cls(**{**config, "experts": experts, "gate": gate})
