"""Random numbers, quickly on every backend."""

import keras
from keras import ops


def uniform(shape, minval, maxval, seed_generator):
    """Uniform float32 noise from `[minval, maxval)`.

    TensorFlow leaves the generator to XLA, whose choice on CPUs is 80 times slower than Philox
    (2 million numbers: 940 ms against 11), so there Philox is asked for by name. On PyTorch Keras
    writes the numbers three times, here they are drawn in their range.

    Args:
        shape: of the noise.
        minval: lower bound.
        maxval: upper bound.
        seed_generator: a `keras.random.SeedGenerator`.

    Returns:
        Tensor of `shape`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        seed = _philox_seed(seed_generator)
        return tf.random.stateless_uniform(shape, seed, minval, maxval, alg="philox")
    if keras.backend.backend() == "torch":
        from keras_moe.ops.torch_only import uniform

        return uniform(shape, minval, maxval, seed_generator.next())
    return keras.random.uniform(shape, minval, maxval, dtype="float32", seed=seed_generator)


def normal(shape, seed_generator):
    """Standard normal float32 noise; on TensorFlow by Philox, see `uniform`.

    Args:
        shape: of the noise.
        seed_generator: a `keras.random.SeedGenerator`.

    Returns:
        Tensor of `shape`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.random.stateless_normal(shape, _philox_seed(seed_generator), alg="philox")
    return keras.random.normal(shape, dtype="float32", seed=seed_generator)


def _philox_seed(seed_generator):
    import tensorflow as tf

    return tf.bitcast(ops.cast(seed_generator.next(), "uint32"), "int32")


def dropout(x, rate, seed_generator):
    """Zeroes a share `rate` of the entries and scales the others up, with the noise of `uniform`.

    Args:
        x: tensor.
        rate: in `[0, 1)`.
        seed_generator: a `keras.random.SeedGenerator`.

    Returns:
        Tensor like `x`.
    """
    return drop(x, uniform(ops.shape(x), 0.0, 1.0, seed_generator) >= rate, rate)


def drop(x, kept, rate):
    """`dropout` with the entries to keep given, booleans like `x`."""
    return ops.where(kept, x * ops.cast(1.0 / (1.0 - rate), x.dtype), ops.zeros((), x.dtype))
