"""What a run that is killed leaves behind: its folder at that moment."""

import contextlib
import shutil

import pytest

from zoo.runs import Run


@contextlib.contextmanager
def copied_after_epoch(epoch, copy):
    """Copies the folder of a run that is trained within, once it has saved an epoch.

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
