"""Tests of `keras_moe/distribution`."""
