"""Full-batch gradient descent of many networks at once, on JAX: seeds are a batch axis.

S seeds, N cases, D inputs, O outputs.
"""

import jax
import keras
from jax import numpy as jnp


class Descent:
    """Trains copies of one model that differ in their initial weights, all in one program.

    It is what `model.fit` does with one batch of all cases and `SGD(step_size)`, and stops each
    copy where its mean squared error is below the criterion.

    Args:
        make_model: function that returns a new model, built; its initial weights are drawn from
            Keras' seed.
        loss: a Keras loss.
        criterion: the mean squared error, of what the model predicts, that ends training.
        max_epochs: ends it otherwise.
    """

    def __init__(self, make_model, loss, criterion, max_epochs):
        self.make_model = make_model
        self.model = make_model()
        self.loss = loss
        self.criterion = criterion
        self.max_epochs = max_epochs
        self._descend = jax.jit(self._descend)

    def initial_weights(self, seeds):
        """List of the model's weights, each `[seeds, ...]`."""
        weights = []
        for seed in seeds:
            keras.utils.set_random_seed(seed)
            weights.append(self.make_model().get_weights())
        return [jnp.stack(copies) for copies in zip(*weights, strict=True)]

    def __call__(self, weights, x_ND, y_NO, step_size):
        """Trains all copies.

        Returns:
            Tuple of the epochs that each took, `[seeds]`; whether each reached the criterion,
            `[seeds]`; and their weights, as `initial_weights` gives them.
        """
        return self._descend(weights, x_ND, y_NO, step_size)

    def outputs(self, weights, x_ND):
        """The model's output of every copy, `[seeds, cases, ...]`."""
        return jax.vmap(lambda weights: self._output(weights, x_ND))(weights)

    def predictions(self, weights, x_ND):
        """What every copy predicts, `[seeds, cases, outputs]`."""
        return self._prediction(self.outputs(weights, x_ND))

    def _output(self, weights, x_ND):
        return self.model.stateless_call(weights, [], x_ND)[0]

    def _prediction(self, output):
        return self.model.blend(output) if hasattr(self.model, "blend") else output

    def _descend(self, weights, x_ND, y_NO, step_size):
        def loss_and_error(weights):
            output = self._output(weights, x_ND)
            error = jnp.mean(jnp.square(self._prediction(output) - y_NO))
            return self.loss(y_NO, output), error

        gradient = jax.vmap(jax.grad(loss_and_error, has_aux=True))

        def is_running(state):
            _, epochs_S, reached_S = state
            return jnp.any(~reached_S & (epochs_S < self.max_epochs))

        def step(state):
            weights, epochs_S, reached_S = state
            by_weights, error_S = gradient(weights)
            reached_S = reached_S | (error_S < self.criterion)
            moves_S = ~reached_S & (epochs_S < self.max_epochs)
            weights = [
                jnp.where(jnp.expand_dims(moves_S, range(1, w.ndim)), w - step_size * by_w, w)
                for w, by_w in zip(weights, by_weights, strict=True)
            ]
            return weights, epochs_S + moves_S, reached_S

        seeds = weights[0].shape[0]
        start = weights, jnp.zeros(seeds, "int32"), jnp.zeros(seeds, "bool")
        weights, epochs_S, reached_S = jax.lax.while_loop(is_running, step, start)
        return epochs_S, reached_S, weights
