"""Tests of `zoo/conversion`."""
