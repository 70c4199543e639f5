"""A small model that learns from a large one: the distillation recipe of Switch Transformers.

Section 4.2 of https://arxiv.org/abs/2101.03961: the dense student starts with the sparse teacher's
weights wherever they have the same ones, and learns from 0.75 of the labels and 0.25 of what the
teacher makes of them. The same for pre-training (Table 6) and for fine-tuning (Table 8).
"""

from collections import Counter
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import metrics


class Copied(NamedTuple):
    """What `copy_weights` did, as lists of paths of weights in the target."""

    copied: list
    kept: list  # what the source has not, or in another shape


def copy_weights(source, target, rename=None):
    """Gives a model every weight of another that both have by the same path, in one shape.

    From a sparse encoder to its dense twin that is all but the experts and their routers (Switch
    Transformers, https://arxiv.org/abs/2101.03961, section 4.2, Table 6): the layers need to have
    the same names. A path that several weights of a model share says nothing, and is not copied;
    nor are routing statistics.

    Args:
        source: a built `keras.Layer` or `keras.Model`.
        target: another, which is changed.
        rename: function from the path of a weight of the target to that of the source's weight
            which it gets; `None`: they are the same.

    Returns:
        `Copied`, which weights of the target were copied, and which kept their values.
    """
    given, copied, kept = _by_path(source), [], []
    taking = _by_path(target)
    for variable in target.weights:
        path = variable.path
        value = given.get(path if rename is None else rename(path))
        if path in taking and value is not None and value.shape == variable.shape:
            variable.assign(ops.copy(value))  # training may donate, and so destroy, its own
            copied.append(path)
        else:
            kept.append(path)
    return Copied(copied, kept)


def _by_path(model):
    weights = [v for v in model.weights if v.name not in metrics.statistics_shapes(1)]
    times = Counter(variable.path for variable in weights)
    return {variable.path: variable for variable in weights if times[variable.path] == 1}


@keras.saving.register_keras_serializable(package="keras_moe")
class Distiller(keras.Model):
    """Trains a student on the labels and on a teacher's probabilities, by `compile` and `fit`.

    `loss = (1 - teacher_weight) * compiled loss + teacher_weight * soft loss + the student's own`,
    where the soft loss is the cross-entropy between the teacher's probabilities and the student's,
    averaged as the compiled loss is, sample weights and masks included, and the student's own are
    those that its layers add. Switch Transformers (https://arxiv.org/abs/2101.03961), section 4.2,
    Table 6. In evaluation the loss is that of the student alone, and the teacher does not run.

    Example:

    ```python
    keras_moe.surgery.copy_weights(teacher, student)
    distiller = keras_moe.surgery.Distiller(student, teacher)
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(inputs, labels)
    student.save("student.keras")
    ```

    Args:
        student: a model from inputs to `[..., classes]` logits.
        teacher: another, from the same inputs, which runs as in inference. Its weights are not
            trained, but for layers that it shares with the student.
        teacher_weight: the share of the teacher's probabilities in the loss, 0 to 1.
        temperature: what both logits are divided by in the soft loss, which is multiplied by its
            square (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2); 1 in the
            paper. A higher one shows the student more of the less probable classes.

    Call arguments: as the student's.

    Returns:
        When called: the student's logits.

    Raises:
        ValueError: if an argument is out of range; if a model ends in a softmax; by `fit`, if there
            is but one logit, or if the two models' logits differ in number.
    """

    def __init__(self, student, teacher, teacher_weight=0.25, temperature=1.0, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= teacher_weight <= 1:
            raise ValueError(
                f"`teacher_weight` must be from 0 to 1. Received: teacher_weight={teacher_weight}"
            )
        if temperature <= 0:
            raise ValueError(
                f"`temperature` must be a positive number. Received: temperature={temperature}"
            )
        for name, model in (("student", student), ("teacher", teacher)):
            if _ends_in_softmax(model):
                raise ValueError(
                    f"`{name}` must return logits. Received: a model whose last layer is a softmax"
                )
        self.student = student
        self.teacher = teacher
        self.teacher_weight = teacher_weight
        self.temperature = temperature

    @property
    def trainable_variables(self):
        return self.student.trainable_variables if self.trainable else []

    @property
    def non_trainable_variables(self):
        return _without(self.variables, self.trainable_variables)

    @property
    def trainable_weights(self):
        return self.trainable_variables

    @property
    def non_trainable_weights(self):
        return _without(self.weights, self.trainable_weights)

    def call(self, inputs, training=False):
        return self.student(inputs, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        # A copy of the weights, which Keras multiplies by the mask in place on PyTorch.
        copy = None if sample_weight is None else ops.copy(sample_weight)
        loss = super().compute_loss(x, y, y_pred, copy, training)
        if not training:
            return loss
        if y_pred.shape[-1] == 1:
            raise ValueError(
                "`student` must have a logit for each of two or more classes. "
                f"Received: outputs of shape {tuple(y_pred.shape)}"
            )
        theirs = self._teacher_logits(x)
        if theirs.shape[-1] != y_pred.shape[-1]:
            raise ValueError(
                "`student` and `teacher` must have the same classes. Received: "
                f"{y_pred.shape[-1]} logits of the student, {theirs.shape[-1]} of the teacher"
            )
        reduction = getattr(self.loss, "reduction", "sum_over_batch_size")
        soft = _SoftLoss(self.temperature, reduction)(theirs, y_pred, sample_weight)
        share = self.teacher_weight
        return (1.0 - share) * loss + share * (soft + sum(self.losses))  # those are in `loss`, too

    def _teacher_logits(self, x):
        # Without state: the losses that the teacher adds, and its statistics, come to nothing.
        trained = [ops.stop_gradient(v.value) for v in self.teacher.trainable_variables]
        others = [v.value for v in self.teacher.non_trainable_variables]
        return self.teacher.stateless_call(trained, others, x, training=False)[0]

    def get_config(self):
        return {
            **super().get_config(),
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher": keras.saving.serialize_keras_object(self.teacher),
            "teacher_weight": self.teacher_weight,
            "temperature": self.temperature,
        }

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("student", "teacher")
        }
        return cls(**{**config, **parts})


class _SoftLoss(keras.losses.Loss):
    """The cross-entropy between the probabilities of a teacher and a student, of both's logits.

    A `keras.losses.Loss` for what it does with sample weights and the mask of the student's logits.
    """

    def __init__(self, temperature, reduction):
        super().__init__("soft_loss", reduction, "float32")
        self.temperature = temperature

    def call(self, y_true, y_pred):
        heat = self.temperature
        theirs = ops.softmax(y_true / heat)
        return heat**2 * ops.categorical_crossentropy(theirs, y_pred / heat, from_logits=True)


def _without(variables, taken):
    """Those of the variables that are not among `taken`."""
    ids = {id(variable) for variable in taken}
    return [variable for variable in variables if id(variable) not in ids]


def _ends_in_softmax(layer):
    """Whether a layer, or the last one of a functional model, is a softmax; `False`: not known."""
    if isinstance(layer, keras.Model):
        outputs = getattr(layer, "outputs", None) or []  # a subclass of one's own has none
        return any(_ends_in_softmax(output._keras_history.operation) for output in outputs)
    is_softmax = isinstance(layer, keras.layers.Softmax)
    return is_softmax or getattr(layer, "activation", None) is keras.activations.softmax
