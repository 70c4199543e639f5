"""Tests of `zoo/tasks`."""
