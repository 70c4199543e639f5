"""Tests of `keras_moe/losses`."""
