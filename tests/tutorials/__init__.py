"""Tests of `tutorials`."""
