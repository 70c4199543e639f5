"""Tests of `keras_moe/routing`."""
