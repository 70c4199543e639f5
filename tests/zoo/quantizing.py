"""Models in bytes, quickly."""

import gc
import warnings


def quantize(model, mode="int8"):
    """`model.quantize(mode)`; Keras warns of each layer that cannot be.

    After each that can it collects garbage, for which all that was imported need not be searched.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        gc.freeze()
        try:
            model.quantize(mode)
        finally:
            gc.unfreeze()
