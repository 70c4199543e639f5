"""Optimizers that know of experts."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_moe")
class Adafactor(keras.optimizers.Adafactor):
    """Adafactor that treats every expert's weights as variables of their own.

    Adam keeps two numbers for each weight. This keeps no first moment, and of the second moment of
    a matrix only the means of its rows and of its columns, from which the matrix is put together
    as their outer product divided by their mean. Shazeer et al. 2017
    (https://arxiv.org/abs/1701.06538), App. D, do so for the weights of experts; Shazeer and Stern
    2018 (https://arxiv.org/abs/1804.04235), Algorithms 4 and 5, made Adafactor of it, with updates
    relative to the size of the weights and clipped by their own.

    In a bank of experts nothing is averaged over the experts: not the second moment, so that a
    kernel `[experts, dim, hidden]` takes `experts * (dim + hidden)` numbers and a bias
    `[experts, hidden]`, whose rows are vectors, is not factored; nor the size of the weights or
    of the update. An expert that saw no tokens for long gets a large update when it sees some
    again: clipped together with the others', it would shorten theirs.

    A bank's variables are known by their attribute `per_expert`, as `FeedForwardExperts` sets it: a
    shape cannot tell a bias `[experts, hidden]` from a kernel `[dim, hidden]`, and a path only as
    long as nobody renames a layer. A bank of your own sets `variable.per_expert = True` where the
    first axis counts experts.

    The kernel of a router and `SoftMoE`'s `phi` are matrices like any other, and factored.

    Other variables are updated as by `keras.optimizers.Adafactor`, which however keeps the whole
    second moment of every matrix too, computes in the dtype of the variable, and divides 0 by 0
    where a row and a column had no gradient yet. The rate is `min(learning_rate, 1 / sqrt(step))`;
    a schedule, and a rate with `relative_step=False`, are taken as they are.

    Example:

    ```python
    model.compile(keras_moe.optimizers.Adafactor(learning_rate=0.01), "mse")
    ```

    Args:
        learning_rate: a float, a `LearningRateSchedule` or a function without arguments; relative
            to the root mean square of the weights.
        beta_2_decay: the second moments' weight of the past is `1 - step ** beta_2_decay`.
        epsilon_1: added to the squares of the gradients.
        epsilon_2: the smallest size that weights are taken to have.
        clip_threshold: largest root mean square of an update, before the rate.
        relative_step: whether a constant rate is at most `1 / sqrt(step)`.
        **kwargs: see `keras.optimizers.Optimizer`. Its `clipnorm` and `global_clipnorm` scale all
            experts alike.
    """

    def build(self, var_list):
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, var_list)  # without Keras' own second moments
        # How many axes count experts, 0 or 1. Asked here, since what TensorFlow updates are not
        # these variables, but its own inside them.
        self._expert_axes = [int(getattr(v, "per_expert", False)) for v in var_list]
        self._moments = []
        for variable, expert_axes in zip(var_list, self._expert_axes, strict=True):
            shape = tuple(variable.shape)
            if len(shape) - expert_axes >= 2:
                shapes = {"rows": shape[:-1], "columns": shape[:-2] + shape[-1:]}
            else:
                shapes = {"second_moment": shape}
            name = variable.path.replace("/", "_")
            self._moments.append(
                [
                    self.add_variable(shape, dtype="float32", name=f"{name}_{kind}")
                    for kind, shape in shapes.items()
                ]
            )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        shape = tuple(variable.shape)
        experts = shape[: self._expert_axes[index]]
        # The whole of it, where TensorFlow has the rows alone that were looked up.
        gradient = ops.reshape(ops.cast(gradient, "float32"), shape)
        step = ops.cast(self.iterations + 1, "float32")
        rate = ops.cast(learning_rate, "float32")
        if self.relative_step and not callable(self._learning_rate):
            rate = ops.minimum(rate, ops.rsqrt(step))

        def size(x):
            """The root mean square, one for all or one per expert; of as many axes as `x`."""
            mean = ops.mean(ops.reshape(ops.square(x), (*experts, -1)), axis=-1)
            return ops.reshape(ops.sqrt(mean), experts + (1,) * (len(shape) - len(experts)))

        # One tensor of the variable's size at a time, and one more while it is made.
        rate = rate * ops.maximum(self.epsilon_2, size(ops.cast(variable, "float32")))
        update = gradient
        for factor in self._factors(gradient, self._moments[index], step):
            update = update * factor
        update = update * (rate / ops.maximum(1.0, size(update) / self.clip_threshold))
        self.assign_sub(variable, ops.cast(update, variable.dtype))

    def _factors(self, gradient, moments, step):
        """Takes the gradient into the second moment; one over its root, as factors to multiply by.

        The moment itself, put together, is too small for float32 where row and column are 1e-30.
        """
        past = 1.0 - ops.power(step, self.beta_2_decay)

        def remember(moment, squares):
            value = past * moment + (1.0 - past) * (squares + self.epsilon_1)
            self.assign(moment, value)
            return value

        squares = ops.square(gradient)
        if len(moments) == 1:
            return [ops.rsqrt(remember(moments[0], squares))]
        rows = remember(moments[0], ops.mean(squares, axis=-1))
        columns = remember(moments[1], ops.mean(squares, axis=-2))
        rows = ops.sqrt(ops.mean(rows, axis=-1, keepdims=True)) * ops.rsqrt(rows)
        return [rows[..., :, None], ops.rsqrt(columns)[..., None, :]]
