"""Tests of `keras_moe/surgery`."""
