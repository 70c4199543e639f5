import json
import subprocess
import sys

import pytest

from zoo.catalogue import did_you_mean, list_presets, shipped
from zoo.tasks.task import get

PRESETS = list_presets()
LISTED = [preset.name for preset in PRESETS]


def test_needs_no_keras():
    program = "import sys, zoo; zoo.list_presets(); sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_names_are_different():
    assert len(set(LISTED)) == len(LISTED)


@pytest.mark.parametrize("preset", PRESETS, ids=LISTED)
def test_entry_is_consistent(preset):
    is_dense = preset.kind in ("dense encoder", "T5", "T5 1.1")
    assert preset.kind in ("dense encoder", "Switch encoder", "expert choice encoder") or (
        preset.kind in ("T5", "T5 1.1", "Switch Transformer") and preset.name.startswith("hf://")
    )
    assert (preset.active_parameters == preset.parameters) == is_dense
    assert 0 < preset.active_parameters <= preset.parameters
    assert preset.licence and preset.training_data
    if preset.file_bytes is not None:
        assert preset.file_bytes in (2 * preset.parameters, 4 * preset.parameters)


@pytest.mark.parametrize("name", shipped())
def test_shipped_preset_is_listed_with_its_scores(name):
    (preset,) = (preset for preset in PRESETS if preset.name == name)
    assert "class_name" in json.loads((shipped()[name] / "config.json").read_text())
    assert len(preset.scores) == 4
    for task, score in preset.scores.items():
        assert get(task).name == task and 0 < score < 1


def test_only_shipped_presets_have_no_address():
    assert [name for name in LISTED if not name.startswith("hf://")] == [
        "dense_mini_en",
        "switch_mini_en",
        "expert_choice_mini_en",
    ]
    assert set(shipped()) == set(LISTED[:3])
    assert all(preset.scores is None for preset in PRESETS[3:])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("switch_mini", "switch_mini_en"),
        ("t5_large", "hf://google-t5/t5-large"),
        ("hf://google/switch-base8", "hf://google/switch-base-8"),
        ("switch-base-8", "hf://google/switch-base-8"),
        ("hf://other/switch-base-8@main", "hf://google/switch-base-8"),
        ("models/of/our/group/dense_mini_en", "dense_mini_en"),
    ],
)
def test_closest_name_is_suggested(name, meant):
    assert repr(meant) in did_you_mean(name)


@pytest.mark.parametrize("name", ["", "nothing like it", None, 7, *LISTED])
def test_nothing_is_suggested_for_a_known_name_or_one_like_none(name):
    assert did_you_mean(name) == did_you_mean(f"{name}@main") == ""


@pytest.mark.parametrize("name", LISTED)
def test_one_letter_too_few_is_forgiven(name):
    end = name.rpartition("/")[2]
    for place in range(len(end)):
        suggested = did_you_mean(end[:place] + end[place + 1 :])
        assert any(repr(other) in suggested for other in LISTED)
