"""Published models that have a name here; needs no Keras."""

import difflib
import importlib.resources
from pathlib import Path
from typing import NamedTuple


class Preset(NamedTuple):
    """What `list_presets` says of a model; `None` where it is not known."""

    name: str
    kind: str
    parameters: int
    active_parameters: int
    file_bytes: int | None
    licence: str | None
    training_data: str | None
    scores: dict | None


def shipped():
    """The presets that come with the library: name -> folder."""
    presets = Path(str(importlib.resources.files("zoo"))) / "assets" / "presets"
    return {folder.name: folder for folder in sorted(presets.glob("*/"))}


def list_presets():
    """The models that `from_preset` loads by name.

    They are those that come with the library, pretrained by this project: see the card in each
    one's folder, `zoo/assets/presets`. And those of the hub's google and google-t5, in
    transformers' format, whose sizes are tested here; none of them has been downloaded in the
    making of this library. Any other checkpoint of a family that `load_transformers` knows is
    loaded in the same way.

    Returns:
        List of `Preset`s: `name`, `kind`, `parameters`, `active_parameters` (per token),
        `file_bytes` (about: 4 bytes a parameter, where the weights are float32), `licence`,
        `training_data` and `scores`: of those that come with the library, fine-tuned, a task's
        primary metric on its validation set, see `zoo/RESULTS.md`.
    """
    text = "786M tokens of English Wikipedia, Wikinews and novels, masked language model"
    tasks = ("glue/cola", "glue/sst2", "glue/mrpc", "glue/stsb")
    scores = {
        "dense": (0.155, 0.826, 0.829, 0.803),
        "switch": (0.176, 0.823, 0.827, 0.793),
        "expert_choice": (0.170, 0.831, 0.823, 0.793),
    }
    twins = {
        "dense": ("dense encoder", 3_344_160, 3_344_160),
        "switch": ("Switch encoder", 12_197_664, 3_350_304),
        "expert_choice": ("expert choice encoder", 12_203_808, 3_356_448),
    }
    c4 = "C4, span corruption (https://arxiv.org/abs/1910.10683)"
    supervised = f"{c4}, and supervised tasks"
    switch = {
        "base-8": (619_339_008, 222_977_280),
        "base-16": (1_072_397_568, 223_051_008),
        "base-32": (1_978_514_688, 223_198_464),
        "base-64": (3_790_748_928, 223_493_376),
        "base-128": (7_415_217_408, 224_083_200),
        "base-256": (14_664_154_368, 225_262_848),
        "large-128": (26_309_291_008, 740_813_824),
        "xxl-128": (394_675_073_024, 11_147_915_264),
        "c-2048": (1_571_308_972_448, 1_728_326_048),
    }
    t5 = {"small": 60_506_624, "base": 222_903_552, "large": 737_668_096}
    t5_1_1 = {
        "small": 76_961_152,
        "base": 247_577_856,
        "large": 783_150_080,
        "xl": 2_849_757_184,
        "xxl": 11_135_332_352,
    }
    rows = [
        *(
            (f"google/switch-{size}", "Switch Transformer", *parameters, None, c4)
            for size, parameters in switch.items()
        ),
        *((f"google-t5/t5-{size}", "T5", n, n, 4 * n, supervised) for size, n in t5.items()),
        *((f"google/t5-v1_1-{size}", "T5 1.1", n, n, 4 * n, c4) for size, n in t5_1_1.items()),
    ]
    return [
        *(
            Preset(
                f"{name}_mini_en",
                *sizes,
                2 * sizes[1],
                "CC-BY-SA-3.0",
                text,
                dict(zip(tasks, scores[name], strict=True)),
            )
            for name, sizes in twins.items()
        ),
        *(
            Preset(f"hf://{name}", kind, total, active, file_bytes, "Apache-2.0", data, None)
            for name, kind, total, active, file_bytes, data in rows
        ),
    ]


def did_you_mean(name):
    """A question that ends an error about a name nobody knows; "" if none is like it."""
    by_end = {preset.name.rpartition("/")[2]: preset.name for preset in list_presets()}
    by_end |= {name: name for name in shipped()}
    name = str(name).partition("@")[0]
    near = difflib.get_close_matches(name.rpartition("/")[2], by_end, n=1)
    if not near or by_end[near[0]] == name:
        return ""
    return f" Did you mean {by_end[near[0]]!r}?"
