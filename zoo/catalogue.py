"""Published models that have a name here; needs no Keras."""

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


def list_presets():
    """The published models that `from_preset` loads by name.

    They are those of the hub's google and google-t5, in transformers' format, whose sizes are
    tested here; none of them has been downloaded in the making of this library. Any other
    checkpoint of a family that `load_transformers` knows is loaded in the same way.

    Returns:
        List of `Preset`s: `name`, `kind`, `parameters`, `active_parameters` (per token),
        `file_bytes`, `licence`, `training_data` and `scores`.
    """
    c4 = "C4, span corruption (https://arxiv.org/abs/1910.10683)"
    supervised = f"{c4}, and supervised tasks"
    rows = [
        *(
            (f"google/switch-base-{experts}", "Switch Transformer", *parameters, c4)
            for experts, parameters in {
                8: (619_339_008, 222_977_280),
                16: (1_072_397_568, 223_051_008),
                32: (1_978_514_688, 223_198_464),
                64: (3_790_748_928, 223_493_376),
                128: (7_415_217_408, 224_083_200),
                256: (14_664_154_368, 225_262_848),
            }.items()
        ),
        ("google/switch-large-128", "Switch Transformer", 26_309_291_008, 740_813_824, c4),
        ("google-t5/t5-small", "T5", 60_506_624, 60_506_624, supervised),
        ("google-t5/t5-base", "T5", 222_903_552, 222_903_552, supervised),
        ("google-t5/t5-large", "T5", 737_668_096, 737_668_096, supervised),
    ]
    return [
        Preset(f"hf://{name}", kind, total, active, None, "Apache-2.0", data, None)
        for name, kind, total, active, data in rows
    ]
