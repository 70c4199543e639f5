"""Optional packages, imported where they are used."""

import importlib


def require(module):
    """Imports a module of the `glue` extra.

    Args:
        module: The dotted name of the module.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed; the sentence names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"GLUE tasks and metrics need the package {package!r}, which "
            "`pip install 'keras-moe[glue]'` installs."
        ) from error
