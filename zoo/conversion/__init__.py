"""Checkpoints in the format of Hugging Face's transformers, read and written."""

from zoo.conversion.folder import load_transformers, save_transformers

__all__ = ["load_transformers", "save_transformers"]
