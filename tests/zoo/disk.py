"""A disk that fails at a chosen step: what do a killed process and a full disk leave behind?"""

import errno
import itertools
import os
import pathlib

import pytest


class Killed(BaseException):
    """Stands for a killed process: every later step fails too, so nothing is cleaned up."""


def full():
    """The error of a write to a full disk."""
    return OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """A context in which one step of the disk fails. The context swallows the error.

    A step makes, renames or removes one file or folder, or writes half of a text. An `OSError`
    is raised only by steps that write.

    Args:
        error: exception to raise.
        number: the step that fails, from 1.

    Attributes:
        failed: whether the program came to that step.
    """

    def __init__(self, error, number):
        self.error = error
        self.number = number
        self.steps = 0
        self.failed = False

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
            self._patch.setattr(os, name, self._after_a_step(getattr(os, name)))
        disk = self

        def write_text(path, text):
            for half in (text[: len(text) // 2], text):
                disk.step(writes=True)
                with open(path, "w") as file:
                    file.write(half)

        self._patch.setattr(pathlib.Path, "write_text", write_text)
        return self

    def __exit__(self, kind, error, traceback):
        self._patch.undo()
        return error is self.error

    def step(self, writes=False):
        if self.failed and isinstance(self.error, Killed):
            raise self.error
        if isinstance(self.error, OSError) and not writes:
            return
        self.steps += 1
        if self.steps == self.number:
            self.failed = True
            raise self.error

    def _after_a_step(self, function):
        def stepped(*arguments, **options):
            self.step()
            return function(*arguments, **options)

        return stepped


def each_step(make_error):
    """Yields a `Disk` for each step of a program, until the program ends before its disk fails."""
    for number in itertools.count(1):
        disk = Disk(make_error(), number)
        yield disk
        if not disk.failed:
            assert number > 1
            return
