"""Optional packages, imported where they are used."""

import contextlib
import importlib
import logging

_NEEDED_BY = {
    "glue": "GLUE tasks and metrics need",
    "hub": "models of the hub and files of safetensors need",
    "torch": "files of PyTorch need",
    "tensorboard": "logs for TensorBoard need",
}


def require(module, extra="glue"):
    """Imports a module of an extra.

    Args:
        module: The dotted name of the module.
        extra: The name of the extra, "glue", "hub", "torch" or "tensorboard".

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed; the sentence names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # Not always the module itself: scikit-learn stands on SciPy.
        package = (error.name or module).partition(".")[0]
        raise ImportError(
            f"{_NEEDED_BY[extra]} the package {package!r}, which "
            f"`pip install 'keras-moe[{extra}]'` installs."
        ) from error


@contextlib.contextmanager
def quiet_datasets(bars=False):
    """Keeps TensorFlow Datasets from warning of folders that are not there yet.

    Args:
        bars: Whether its progress bars, which show where it builds, stay.

    Raises:
        ImportError: If TensorFlow Datasets is not installed.
    """
    tqdm = require("tensorflow_datasets.core.utils.tqdm_utils")
    log = logging.getLogger("absl")
    level, active = log.level, tqdm._active
    log.setLevel(logging.ERROR)
    tqdm.display_progress_bar(active and bars)
    try:
        yield
    finally:
        log.setLevel(level)
        tqdm.display_progress_bar(active)
