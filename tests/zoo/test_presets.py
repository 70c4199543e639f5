import json
import re
import shutil

import keras
import numpy as np
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


@pytest.fixture
def lacking(preset, tmp_path):
    """A copy of the preset without one of its files."""

    def copy(name):
        shutil.copytree(preset, tmp_path / name)
        (tmp_path / name / name).unlink()
        return tmp_path / name

    return copy


def error_of(folder, **options):
    with pytest.raises(ValueError) as caught:
        zoo.from_preset(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_the_first_weight_that_differs_and_both_shapes(preset, edit):
    edit("hidden_dim", 12)
    message = error_of(preset)
    assert re.search(r"weight '\S+' has shape \(12.*\) in the model and \(8", message), message


def test_missing_weights(preset, edit):
    edit("num_layers", 2)
    assert "expected 1 variables, but received 0" in error_of(preset)


def test_damaged_weights(preset):
    weights = preset / "model.weights.h5"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "truncated" in error_of(preset)
    weights.write_bytes(whole)
    assert zoo.from_preset(preset).num_classes == 2


def test_missing_weight_files(lacking):
    folder = lacking("model.weights.h5")
    for options in ({}, {"num_classes": 3}):
        message = error_of(folder, **options)
        assert message.startswith("`preset` must hold the file 'model.weights.h5'. Received:")
    assert zoo.from_preset(folder, load_weights=False).num_classes == 2
    folder = lacking("task.weights.h5")
    assert "must hold the file 'task.weights.h5'" in error_of(folder)
    assert zoo.from_preset(folder, num_classes=3).num_classes == 3


def test_without_task_json_the_classes_must_be_told(lacking):
    folder = lacking("task.json")
    assert error_of(folder).startswith("`num_classes` must be given for a preset without")
    assert zoo.from_preset(folder, num_classes=3).num_classes == 3


@pytest.mark.parametrize("name", ["config.json", "task.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "3", "{", ""])
def test_a_config_that_is_none(preset, tmp_path, name, text):
    shutil.copytree(preset, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(text)
    message = error_of(tmp_path / "copy")
    assert message.startswith(f"`preset` must hold a '{name}' that describes a Keras object")
    assert message.endswith("copy'")


@pytest.mark.parametrize("config", [[], {"backbone": 1}])
def test_a_config_with_the_wrong_entries(preset, tmp_path, config):
    shutil.copytree(preset, tmp_path / "copy")
    path = tmp_path / "copy" / "task.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    assert "does not fit or is damaged: " in error_of(tmp_path / "copy")


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, "two"])
def test_bad_num_classes(preset, num_classes):
    message = error_of(preset, num_classes=num_classes)
    expected = f"`num_classes` must be a positive integer. Received: num_classes={num_classes!r}"
    assert message == expected


def test_options(preset):
    saved = zoo.from_preset(preset)
    weights = [keras.ops.convert_to_numpy(w) for w in saved.weights]
    for options, same in (({}, len(weights)), ({"num_classes": np.int64(2)}, len(weights) - 1)):
        # The head's bias is zero in all.
        model = zoo.from_preset(preset, **options)
        pairs = zip(model.weights, weights, strict=True)
        assert sum(np.array_equal(keras.ops.convert_to_numpy(a), b) for a, b in pairs) == same
    fresh = zoo.from_preset(preset, load_weights=False).backbone.token_embedding.embeddings
    saved = saved.backbone.token_embedding.embeddings
    assert not np.array_equal(*map(keras.ops.convert_to_numpy, (fresh, saved)))
    assert zoo.from_preset(preset, dtype="bfloat16").backbone.dtype_policy.name == "bfloat16"


def test_an_unknown_option_is_refused(preset):
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_class'"):
        zoo.from_preset(preset, num_class=3)


def test_no_preset(tmp_path):
    assert "`preset` must be the folder of a saved preset" in error_of(tmp_path)
