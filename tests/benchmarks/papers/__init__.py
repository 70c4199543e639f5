"""Tests of `benchmarks/papers`."""
