"""A run that processes can share: `python -m tests.zoo.finetuning FOLDER MESH` prints its epoch."""

import json
import sys

from tests.zoo.test_training import TINY
from zoo import training
from zoo.models import builders


def main(folder, mesh):
    builders.SIZES["mini"] = {**builders.SIZES["mini"], **TINY}
    options = {"epochs": 1, "max_examples": 32, "max_length": 8, "batch_size": 8, "dropout": 0.0}
    results = training.finetune(**options, mesh=json.loads(mesh), output=folder, verbose=0)
    print(json.dumps(results["history"][0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
