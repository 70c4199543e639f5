"""A small mistake in the source, and the tests that must notice it."""

import dataclasses
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
END_TO_END = "tests/test_end_to_end.py"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One planted fault.

    Args:
        file: path of the mutated file, relative to the repository.
        old: text that occurs exactly once in the file.
        new: text that replaces it.
        wrong: what is wrong then, in a few words.
        tests: paths of tests, or node ids, besides the file's mirror; needed where there is none.
        backend: backend on which the tests run.
    """

    file: str
    old: str
    new: str
    wrong: str
    tests: tuple = ()
    backend: str = "torch"

    @property
    def name(self):
        return f"{self.file}: {self.wrong}"

    def mirror(self):
        """Path of the tests that mirror the file, or `None`."""
        file = pathlib.Path("tests", self.file)
        path = file.with_name(f"test_{file.name}")
        return str(path) if (ROOT / path).exists() else None

    def commands(self):
        """Tuples of paths for pytest: the mirror and the tests named; for a layer end to end."""
        mirror = self.mirror()
        paths = (*([mirror] if mirror else []), *self.tests)
        if self.file.startswith("keras_moe/") and self.backend == "torch":
            return paths, (END_TO_END,)
        return (paths,)

    def plant(self, root):
        """The text of the file in a copy of the repository, and the text with the fault.

        Raises:
            ValueError: if the text to replace does not occur exactly once.
        """
        text = pathlib.Path(root, self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"`old` must occur once in {self.file}. Received: {self.old!r}, which occurs "
                f"{text.count(self.old)} times"
            )
        return text, text.replace(self.old, self.new)
