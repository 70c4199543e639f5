"""Random numbers, quickly on every backend."""

import math

import keras
from keras import ops


def uniform(shape, minval, maxval, seed_generator):
    """Uniform float32 noise from `[minval, maxval)`.

    TensorFlow leaves the generator to XLA, whose choice on CPUs is 80 times slower than Philox
    (2 million numbers: 940 ms against 11), so there Philox is asked for by name. On PyTorch Keras
    writes the numbers three times; here they are drawn in their range. On JAX 16 bits of randomness
    per number, 65,536 steps, take half the time of 32.

    Args:
        shape: of the noise.
        minval: lower bound.
        maxval: upper bound.
        seed_generator: a `keras.random.SeedGenerator`.

    Returns:
        Tensor of `shape`.
    """
    backend, seed = keras.backend.backend(), seed_generator.next()
    if backend == "jax":
        import jax

        size = math.prod(shape)
        pairs = jax.random.bits(seed, ((size + 1) // 2,), "uint32")
        bits = jax.lax.bitcast_convert_type(pairs, "uint16").reshape(-1)[:size].reshape(shape)
        return minval + (maxval - minval) / 65536 * bits.astype("float32")
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.random.stateless_uniform(shape, _philox(seed), minval, maxval, alg="philox")
    from keras_moe.ops.torch_only import uniform

    return uniform(shape, minval, maxval, seed)


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

        return tf.random.stateless_normal(shape, _philox(seed_generator.next()), alg="philox")
    return keras.random.normal(shape, dtype="float32", seed=seed_generator)


def _philox(seed):
    """A seed of Keras as TensorFlow wants it."""
    import tensorflow as tf

    return tf.bitcast(ops.cast(seed, "uint32"), "int32")


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
