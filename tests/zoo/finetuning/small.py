"""A tiny model, sentences short enough for one shape, and quick runs."""

import numpy as np

import zoo
from zoo.tasks.data import Examples
from zoo.tasks.task import get

TINY = {
    "num_layers": 1,
    "sparse_blocks": (1,),
    "num_heads": 2,
    "hidden_dim": 16,
    "key_dim": 8,
    "intermediate_dim": 32,
}


def load(task, split, data_dir=None):
    """64 examples to train on, 21 of any other split."""
    rng = np.random.default_rng(len(split))
    labels = rng.integers(0, 2, 64 if split == "train" else 21).astype("int32")
    words = np.array([["bad", "poor", "dull"], ["good", "fine", "great"]])
    texts = [f"a {words[label][rng.integers(3)]} film" for label in labels]
    columns = (texts,) if len(get(task).inputs) == 1 else (texts, texts)
    if get(task).labels is None:
        labels = labels.astype("float32") * 5
    return Examples(columns, labels)


def run(output, task="glue/cola", model="switch", finetune=None, **options):
    defaults = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-2}
    defaults |= {"max_length": 10, "verbose": 0, "output": output}
    if "preset" in options:
        model = None
    else:
        defaults["size"] = "tiny"
        if model != "dense":
            defaults["num_experts"] = 4
    return (finetune or zoo.finetune)(task, model, **(defaults | options))
