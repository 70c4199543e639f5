"""Models in bytes."""

import warnings


def quantize(model, mode="int8"):
    """`model.quantize(mode)`; Keras warns of each layer that cannot be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        model.quantize(mode)
