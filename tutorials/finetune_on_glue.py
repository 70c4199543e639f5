# %% [markdown]
# # Fine-tuning a pretrained mixture of experts on GLUE
#
#     KERAS_BACKEND=jax python tutorials/finetune_on_glue.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set), and
# `pip install 'keras-moe[glue]'`; two minutes and 3 GB. Expected: after three passes over two
# thousand sentences the pretrained model tells some of the broken ones, Matthews' correlation 0.2
# or so; the same model from scratch has learnt next to nothing, 0.05.
#
# What you learn: to load one of the library's pretrained encoders by its name, to fine-tune it on a
# task of GLUE or SuperGLUE, to see what pretraining was worth, and to use what comes out.

# %%
import keras

import zoo
from zoo.finetuning.summary import table

SIZE = 1.0  # 1.0 gives the results on this page; a smaller value trains less and runs faster

# %% [markdown]
# ## What there is
# Three encoders come with the library, twins in everything but their feed-forward layers: dense,
# Switch with 16 experts, and expert choice with 32. A token costs the same number of operations in
# all of them. They read the same text, as often, in the same order.

# %%
for preset in zoo.list_presets()[:3]:
    print(
        f"{preset.name:24}{preset.parameters / 1e6:5.1f}M parameters, of which a token uses"
        f" {preset.active_parameters / 1e6:.1f}M; {preset.file_bytes / 1e6:.0f} MB"
    )

# %% [markdown]
# ## The task
# `"acceptability"` comes with the library, too: it has the form of CoLA, and its sentences are
# written by a small grammar. The tasks of GLUE and SuperGLUE are run in the same way, by another
# name and with the folder of TensorFlow Datasets (`python -m zoo prepare` makes one of the official
# files). For the whole of CoLA change the last line to
# `TASK = {"task": "glue/cola", "data_dir": "tfds"}`, and nothing else.

# %%
EXAMPLES, EPOCHS = round(2000 * SIZE), max(1, round(3 * SIZE))
TASK = {"task": "acceptability", "max_examples": EXAMPLES, "epochs": EPOCHS}

# %% [markdown]
# ## Twice the same model
# Once from its pretrained weights, with experts that stay as they are, and once from new ones, from
# scratch, all of which learn. `finetune_suite` takes a run for each seed (five make a result that
# one can trust; here it is one), writes everything it does to a folder, and goes on from there if
# it is interrupted. What is not said, the rate, say, is as `python -m zoo finetune --help` has it
# for presets.

# %%
summaries = {
    name: zoo.finetune_suite(
        **TASK,
        preset="expert_choice_mini_en",
        load_weights=name == "pretrained",
        seeds=1,
        output=f"runs/{name}",
        verbose=2,
    )
    for name in ("pretrained", "scratch")
}
for name, summary in summaries.items():
    print(f"{name}:\n{table(summary)}\n")

# %% [markdown]
# `zoo.compare` puts them beside each other; with several seeds it also says what chance makes of
# the difference. `python -m zoo compare runs/scratch runs/pretrained` prints the same.

# %%
compared = zoo.compare("runs/scratch", "runs/pretrained")
(task,) = compared["tasks"]
scores = {
    name: model["mean"]
    for name, model in zip(
        ("scratch", "pretrained"), compared["tasks"][task]["models"], strict=True
    )
}
print(compared["tasks"][task]["metric"], scores)

# %% [markdown]
# ## A classifier of your own
# What was trained is a preset like those it began with: a model that takes strings. It goes on with
# `fit`, is saved by `save_to_preset`, and is looked into like any other, see
# [reading a router](reading_a_router.ipynb).

# %%
classifier = zoo.from_preset(f"runs/pretrained/{task.replace('/', '-')}/seed0/preset")
sentences = ["There were three heavy shelves in this library.", "There was three shelves in this."]
logits = classifier.predict(sentences, verbose=0)
for sentence, probability in zip(sentences, keras.ops.softmax(logits)[:, 1], strict=True):
    print(f"{float(probability):.2f}  {sentence}")
