"""Tests of `keras_moe`."""
