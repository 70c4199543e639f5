"""Tutorials: scripts that are run, and the notebooks made of them; see README.md."""
