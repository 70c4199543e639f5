"""How presets are fine-tuned unless told otherwise: one table, by kind of model and by task.

Sparse models overfit small tasks and want more dropout within the experts (Fedus et al. 2022,
https://arxiv.org/abs/2101.03961, Table 4: 0.1, and 0.4 in the experts) and smaller batches than
dense ones (Zoph et al. 2022, https://arxiv.org/abs/2202.08906, section 4.3), and do as well with
experts that stay as they are (section 4.2; here the routers learn).

What was tried here was judged by the validation sets, mostly with one seed, and differs by less
than seeds do: on CoLA five of the dense preset lie between 0.144 and 0.184. Frozen experts gain
0.005 to 0.007 on STS-B, and half the rate on CoLA 0.015 (dense) to 0.04 (sparse, frozen); yet
Switch has 0.161 there with all trained at the whole rate, and 0.158 so. Twice the rate, which
section 4.3 would have for sparse models, lost 0.03 with expert choice.
"""

from zoo.tasks.task import get

_DENSE = {"train": "all", "batch_size": 32, "dropout": 0.1, "expert_dropout": None}
_SPARSE = {"train": "frozen_experts", "batch_size": 16, "dropout": 0.1, "expert_dropout": 0.4}

# Epochs, rates and longer texts than most; a task that is not named is a large one and has two
# epochs, a rate of 1e-3, and 64 tokens for a sentence or 128 for two. More epochs do not help: the
# scores of STS-B and MRPC rise by less than 0.01 in their third, and those of SST-2 fall. At half
# the rate expert choice is 0.02 worse on STS-B. Other tasks' were not tuned.
_EPOCHS = {
    "acceptability": 3,
    "glue/cola": 4,
    "glue/mrpc": 3,
    "glue/rte": 3,
    "glue/stsb": 3,
    "glue/wnli": 4,
    "super_glue/boolq": 3,
    "super_glue/cb": 8,
    "super_glue/copa": 6,
    "super_glue/multirc": 1,
    "super_glue/rte": 3,
    "super_glue/wic": 5,
    "super_glue/wsc": 6,
}
_RATE = {"glue/cola": 5e-4}
_MAX_LENGTH = {
    "super_glue/boolq": 256,
    "super_glue/multirc": 384,
    "super_glue/record": 384,
}


def preset_recipe(task, sparse):
    """The defaults of `zoo.finetune` for a preset.

    Args:
        task: The name of a task, or a `Task`.
        sparse: whether the preset has experts.

    Returns:
        A dict of `epochs`, `learning_rate`, `train` (where the preset's weights are taken),
        `batch_size`, `dropout`, `expert_dropout` (`None` of a dense model), `max_length` and
        `pairs` (`None` of a task with one text).
    """
    task = get(task)
    return {
        "epochs": _EPOCHS.get(task.name, 2),
        "learning_rate": _RATE.get(task.name, 1e-3),
        **(_SPARSE if sparse else _DENSE),
        "max_length": _MAX_LENGTH.get(task.name, 64 if len(task.inputs) == 1 else 128),
        "pairs": pairs(task),
    }


def pairs(task):
    """How the two texts of a task's examples are read unless told otherwise, see `zoo.finetune`."""
    return "apart" if len(get(task).inputs) == 2 else None
