"""Functions with a gradient of their own."""

import keras


def with_gradient(forward, backward, plain=None):
    """Returns the function `forward`, differentiated by `backward`.

    The functions may not close over tensors: everything that is not a Python number or a shape is
    an input. So every transformation of a backend sees one operation with its inputs, and never
    looks into `forward`. `backward` serves ordinary training, the first derivative in reverse mode.
    All other derivatives (forward mode, derivatives of derivatives) differentiate `plain`, which
    also stands in where PyTorch maps or exports the function.

    Args:
        forward: function of the inputs, which are tensors of floats or integers, to one tensor.
        backward: function of the gradient of the output and of the inputs. It returns a list with
            an entry for every input: `None` for integers, else a function without arguments that
            computes the gradient of this input. Only the gradients that are wanted are computed.
        plain: function that computes what `forward` computes, from operations that the backend can
            differentiate and map as often as it likes. `None`: `forward` is such a function.

    Returns:
        Function of the inputs.
    """
    plain = plain or forward
    backend = keras.backend.backend()
    if backend == "torch":
        from keras_moe.ops.torch_only import WithGradient, is_exporting

        if is_exporting():  # the program runs where these operators are not known
            return plain
        return lambda *inputs: WithGradient.apply(forward, backward, plain, *inputs)
    if backend == "jax":
        from keras_moe.ops import jax_gradients

        return jax_gradients.with_gradient(forward, backward, plain)
    return _tensorflow_with_gradient(forward, backward, plain)


def _tensorflow_with_gradient(forward, backward, plain):
    import tensorflow as tf

    def hidden(inputs):  # from tapes that are open: they see the whole function only
        return [tf.stop_gradient(x) for x in inputs]

    @tf.custom_gradient
    def function(*inputs):
        def gradient(upstream):
            wanted, gradients = pull(upstream, *inputs)
            found = dict(zip(wanted, gradients, strict=True))
            return [found.get(i) for i in range(len(inputs))]

        return forward(*hidden(inputs)), gradient

    def pull(upstream, *inputs):
        """The positions of the inputs that have gradients, and these."""
        computations = backward(*hidden([upstream, *inputs]))
        wanted = [i for i, compute in enumerate(computations) if compute is not None]

        @tf.custom_gradient
        def gradients(upstream, *inputs):
            def gradient(*upstreams):
                second = second_gradients(wanted, upstream, inputs, upstreams)
                found = dict(zip(wanted, second[1:], strict=True))
                return [second[0], *(found.get(i) for i in range(len(inputs)))]

            return [computations[i]() for i in wanted], gradient

        return wanted, gradients(upstream, *inputs)

    def second_gradients(wanted, *tensors):
        """The gradients of `pull`'s results in `upstream` and in the inputs that have gradients."""

        def compute(upstream, inputs, upstreams):  # by the graph: in forward mode no tape records
            floats = [inputs[i] for i in wanted]
            first = tf.gradients(plain(*inputs), floats, upstream, unconnected_gradients="zero")
            first = [tf.convert_to_tensor(g) for g in first]  # of a gather: a list of rows
            floats = [upstream, *floats]
            return tf.gradients(first, floats, list(upstreams), unconnected_gradients="zero")

        if tf.executing_eagerly():
            compute = tf.function(compute)
        return compute(*tf.nest.map_structure(tf.stop_gradient, tensors))

    return lambda *inputs: function(*map(tf.convert_to_tensor, inputs))
