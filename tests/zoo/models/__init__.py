"""Tests of `zoo/models`."""
