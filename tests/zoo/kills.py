"""A killed run leaves its folder as it is at that moment. A copy of the folder is as good."""

import contextlib
import shutil

import pytest

from zoo.runs import Run


@contextlib.contextmanager
def copied_after_epoch(epoch, copy):
    """A context in which the folder of a run is copied as soon as the run has saved an epoch.

    Args:
        epoch: number of the epoch, from 1.
        copy: path of the copy.
    """
    original = Run.save

    def save(self, *arguments, **options):
        original(self, *arguments, **options)
        if self.epoch == epoch:
            shutil.copytree(self.folder, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save)
        yield
