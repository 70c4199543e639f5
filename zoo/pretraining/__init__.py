"""Pretraining: text, objectives, and the run."""
