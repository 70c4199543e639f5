"""Experts on several devices."""

from keras_moe.distribution.parallel import ExpertParallel

__all__ = ["ExpertParallel"]
