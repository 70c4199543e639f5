import json
import re

import pytest

import zoo


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    backbone = zoo.EncoderBackbone(
        vocabulary_size=8000,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        key_dim=4,
        intermediate_dim=16,
    )
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 12)
    zoo.EncoderTextClassifier(backbone, 2, preprocessor).save_to_preset(str(folder))
    return folder


@pytest.fixture
def edit(preset):
    """Changes one entry of the backbone's config; the preset is as it was afterwards."""
    files = {name: (preset / name).read_text() for name in ("config.json", "task.json")}

    def change(name, value):
        config, task = (json.loads(text) for text in files.values())
        config["config"][name] = task["config"]["backbone"]["config"][name] = value
        (preset / "config.json").write_text(json.dumps(config))
        (preset / "task.json").write_text(json.dumps(task))

    yield change
    for name, text in files.items():
        (preset / name).write_text(text)


def error_of(folder):
    with pytest.raises(ValueError) as caught:
        zoo.from_preset(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_the_first_weight_that_differs_and_both_shapes(preset, edit):
    edit("hidden_dim", 12)
    message = error_of(preset)
    assert re.search(r"weight '\S+' has shape \(12.*\) in the model and \(8", message), message


def test_missing_weights(preset, edit):
    edit("num_layers", 2)
    assert "expected 1 variables, but received 0" in error_of(preset)


def test_damaged_and_missing_files(preset):
    weights = preset / "model.weights.h5"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "truncated" in error_of(preset)
    weights.unlink()
    assert "model.weights" in error_of(preset)
    weights.write_bytes(whole)
    assert zoo.from_preset(preset).num_classes == 2


def test_no_preset(tmp_path):
    assert "`preset` must be the folder of a saved preset" in error_of(tmp_path)
