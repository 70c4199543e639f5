"""A run that processes can share: `python -m tests.zoo.pretraining.on_devices TEXT FOLDER MESH`."""

import json
import sys
from pathlib import Path

from tests.zoo.pretraining.test_run import QUICK, TINY
from zoo.models import builders
from zoo.pretraining.run import pretrain


def main(text, folder, mesh):
    builders.SIZES["mini"] = {**builders.SIZES["mini"], **TINY}
    options = {**QUICK, "dropout": 0.0, "mesh": json.loads(mesh), "output": folder}
    files = [[str(Path(text) / f"{name}.txt")] for name in ("train", "heldout")]
    print(json.dumps(pretrain("switch", files[0], heldout=files[1], **options)["history"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
