"""A run that processes can share: `python -m tests.zoo.finetuning.on_devices FOLDER MESH`."""

import json
import sys

import zoo
from tests.zoo.finetuning.small import TINY
from zoo.models import builders


def main(folder, mesh):
    builders.SIZES["mini"] = {**builders.SIZES["mini"], **TINY}
    options = {"epochs": 1, "max_examples": 32, "max_length": 8, "batch_size": 8, "dropout": 0.0}
    options["mix_layers"] = True  # a weight of the head that is neither an expert's nor a kernel
    results = zoo.finetune(**options, mesh=json.loads(mesh), output=folder, verbose=0)
    print(json.dumps(results["history"][0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
