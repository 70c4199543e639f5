"""Makes the notebooks of the tutorials from their scripts, and the figures that they show.

python -m tutorials              writes `tutorials/*.ipynb`
python -m tutorials --figures    runs the scripts too, and keeps the pictures that they draw
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from tutorials.notebooks import notebook

FOLDER = pathlib.Path(__file__).parent


def scripts():
    """Paths of all tutorials."""
    return [path for path in sorted(FOLDER.glob("*.py")) if path.read_text().startswith("# %%")]


def draw(path):
    """Runs a tutorial in a folder of its own, and takes over its pictures."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, path], cwd=folder, env=environment, check=True)
        for picture in pathlib.Path(folder).rglob("*.png"):
            (FOLDER / "figures").mkdir(exist_ok=True)
            shutil.copy(picture, FOLDER / "figures")


def main():
    parser = argparse.ArgumentParser(prog="python -m tutorials", description=__doc__.split("\n")[0])
    parser.add_argument("--figures", action="store_true", help="run the scripts, keep the pictures")
    parser.add_argument("names", nargs="*", help="of tutorials; all of them by default")
    chosen = parser.parse_args()
    for path in scripts():
        if chosen.names and path.stem not in chosen.names:
            continue
        if chosen.figures:
            draw(path)
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()))


if __name__ == "__main__":
    main()
