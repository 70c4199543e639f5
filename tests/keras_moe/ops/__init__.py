"""Tests of `keras_moe/ops`."""
