"""Models made from other models."""

from keras_moe.surgery.distil import Copied, Distiller, copy_weights

__all__ = ["Copied", "Distiller", "copy_weights"]
