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
        modules = [module.removesuffix(".__init__") for module in self.order]
        above = modules[: self.order.index(name)]
        for imported in self.imports(name):
            package, _, rest = imported.partition(".")
            module = rest if rest in modules else rest.rpartition(".")[0]  # or a name within one
            if package == self.package and (module or "__init__") not in above:
                yield imported
