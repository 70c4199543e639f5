"""The order in which a package's files are read: each imports only from those above it."""

import ast
import importlib
import pathlib


class House:
    """A package's files, read from top to bottom.

    Args:
        package: its name.
        order: dotted names of all its modules.
    """

    def __init__(self, package, order):
        self.package = package
        self.order = order
        self.folder = pathlib.Path(importlib.import_module(package).__file__).parent

    def files(self):
        """Dotted names of the modules that are there."""
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*.py"))
        return {".".join(file.with_suffix("").parts) for file in files}

    def tree(self, name):
        """A module, parsed."""
        return ast.parse(self.folder.joinpath(*name.split(".")).with_suffix(".py").read_text())

    def imports(self, name):
        """Dotted names of all that a module imports, wherever in its file."""
        for node in ast.walk(self.tree(name)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}.py: imports are absolute"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def not_from_above(self, name):
        """What a module imports of its package, and from no module above it."""
        above = self.order[: self.order.index(name)]
        known = {module.removesuffix(".__init__") for module in above}
        for imported in self.imports(name):
            package, _, rest = imported.partition(".")
            # The name of a module, or of something within one.
            if package == self.package and known.isdisjoint((rest, rest.rpartition(".")[0])):
                yield imported
