import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
import zoo
from tests.backend import marked
from zoo.catalogue import shipped
from zoo.conversion import save_transformers
from zoo.hub import sha256
from zoo.models.deferred import Deferred
from zoo.tasks.task import get

SHIPPED = ("dense_mini_en", "switch_mini_en", "expert_choice_mini_en")
TEXT = (
    "The war ended in the spring of the following year, and the king returned to the city with "
    "his army. He was the first of his family to rule the country, and one of the most important "
    "men of the century."
)


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
    assert re.search(r"'key'.*\b1\b.*\b0\b", error_of(preset))


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
        assert re.match("`preset`.*'model.weights.h5'", error_of(folder, **options))
    assert zoo.from_preset(folder, load_weights=False).num_classes == 2
    folder = lacking("task.weights.h5")
    assert re.match("`preset`.*'task.weights.h5'", error_of(folder))
    assert zoo.from_preset(folder, num_classes=3).num_classes == 3


def test_without_task_json_the_classes_must_be_told(lacking):
    folder = lacking("task.json")
    assert re.match("`num_classes`.*`task.json`.*num_classes=None", error_of(folder))
    assert zoo.from_preset(folder, num_classes=3).num_classes == 3


@pytest.mark.parametrize("name", ["config.json", "task.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "3", "{", ""])
def test_a_config_that_is_none(preset, tmp_path, name, text):
    shutil.copytree(preset, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(text)
    start = "`preset`" if text == "{}" else f"'{name}' must hold a JSON object"
    assert re.match(f"{start}.*copy.*", error_of(tmp_path / "copy"))
    assert repr(name) in error_of(tmp_path / "copy")


@pytest.mark.parametrize("config", [[], "4", {"backbone": 1}, {"preprocessor": 3}])
def test_a_config_with_the_wrong_entries(preset, tmp_path, config):
    shutil.copytree(preset, tmp_path / "copy")
    path = tmp_path / "copy" / "task.json"
    content = json.loads(path.read_text())
    content["config"] = {**content["config"], **config} if isinstance(config, dict) else config
    path.write_text(json.dumps(content))
    assert re.search("'task.json'", error_of(tmp_path / "copy"))


@pytest.mark.parametrize("name", [["zoo>EncoderMaskedLM"], {"a": 1}, 3, None])
def test_a_name_that_is_none(preset, tmp_path, name):
    shutil.copytree(preset, tmp_path / "copy")
    path = tmp_path / "copy" / "task.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"registered_name": name}))
    assert re.search("'task.json'", error_of(tmp_path / "copy"))


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _spoil_a_piece(path):
    content = bytearray(path.read_bytes())
    content[content.index("\u2581".encode(), 40)] ^= 0x40  # no UTF-8 any more
    path.write_bytes(content)


def _make_a_folder(path):
    path.unlink()
    path.mkdir()


def _break_a_link(path):
    path.unlink()
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *(("model.weights.h5", change) for change in (_halve, _make_a_folder, _break_a_link)),
        *(("task.weights.h5", change) for change in (_halve, _make_a_folder, _break_a_link)),
        *(("task.json", change) for change in (_halve, _make_a_folder, _break_a_link)),
        ("tokenizer.json", _break_a_link),
        ("sha256.json", _make_a_folder),
        ("sha256.json", _break_a_link),
        ("assets/tokenizer/vocabulary.spm", _halve),
        ("assets/tokenizer/vocabulary.spm", _spoil_a_piece),
        ("assets/tokenizer/vocabulary.spm", _make_a_folder),
    ],
)
def test_the_damaged_file_is_named(preset, tmp_path, file, change):
    shutil.copytree(preset, tmp_path / "copy")
    (tmp_path / "copy" / "sha256.json").touch()
    change(tmp_path / "copy" / file)
    if file != "sha256.json":
        (tmp_path / "copy" / "sha256.json").unlink()
    message = error_of(tmp_path / "copy")
    assert Path(file).name in message and "\n" not in message


@pytest.mark.parametrize(
    "name", ["vocabulary_size", "num_layers", "intermediate_dim", "num_heads", "num_experts"]
)
def test_a_size_far_beyond_the_weights(preset, tmp_path, name):
    """It is refused before memory is taken for it."""
    shutil.copytree(preset, tmp_path / "copy")
    for file in ("config.json", "task.json"):
        path = tmp_path / "copy" / file
        content = json.loads(path.read_text())
        part = content if file == "config.json" else content["config"]["backbone"]
        part["config"][name] = 10**9
        if name == "num_experts":
            router = keras.saving.serialize_keras_object(keras_moe.SwitchRouter())
            part["config"] |= {"router": router, "sparse_blocks": [1]}
        path.write_text(json.dumps(content))
    message = error_of(tmp_path / "copy")
    assert re.search(f"'config.json'.*more weights.*Received:.*{name}=1000000000", message)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, "two"])
def test_bad_num_classes(preset, num_classes):
    message = error_of(preset, num_classes=num_classes)
    assert re.match(f"`num_classes`.*num_classes={num_classes!r}$", message)


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


def test_other_rates_of_dropout(tmp_path):
    widths = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "key_dim": 4, "expert_dim": 6}
    backbone = zoo.switch_transformer("mini", num_experts=2, architecture="encoder", **widths)
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 12)
    zoo.EncoderTextClassifier(backbone, 2, preprocessor).save_to_preset(str(tmp_path / "saved"))
    model = zoo.from_preset(tmp_path / "saved", dropout=0.3, expert_dropout=0.4)
    assert model.dropout == model.backbone.dropout == 0.3
    assert model.backbone.expert_dropout == 0.4
    for name in ("embedding_dropout", "output_dropout"):
        assert model.backbone.get_layer(name).rate == 0.3
    assert model.get_layer("classifier_dropout").rate == 0.3
    blocks = [model.backbone.get_layer(f"block_{n}") for n in (1, 2)]
    for block in blocks:
        assert block.residual_dropout.rate == block.attention.attention_dropout.rate == 0.3
    dense, sparse = (block.feed_forward for block in blocks)
    assert (dense.hidden_dropout.rate, sparse.experts.dropout) == (0.3, 0.4)
    as_saved = zoo.from_preset(tmp_path / "saved")
    for ours, theirs in zip(model.get_weights(), as_saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    text = ["a text"]
    np.testing.assert_array_equal(model.predict(text), as_saved.predict(text))


def test_rates_that_are_none(preset):
    for name in ("dropout", "expert_dropout"):
        message = error_of(preset, **{name: 1.0})
        assert re.match(rf"`{name}`.*\[0, 1\).*{name}=1.0$", message)
    message = error_of(preset, expert_dropout=0.4)
    assert re.match("`expert_dropout`.*None.*expert_dropout=0.4$", message)


def test_auto_is_the_dtype_that_was_saved(preset, tmp_path):
    zoo.from_preset(preset, dtype="bfloat16").save_to_preset(str(tmp_path))
    for dtype, name in (("auto", "bfloat16"), (None, "float32")):
        assert zoo.from_preset(tmp_path, dtype=dtype).backbone.dtype_policy.name == name
    assert zoo.from_preset(preset, dtype="auto").backbone.dtype_policy.name == "float32"


def test_an_unknown_option_is_refused(preset):
    with pytest.raises(TypeError, match="'num_class'"):
        zoo.from_preset(preset, num_class=3)


def test_no_preset(tmp_path):
    said, within = f"`preset`.*`config.json`.*preset='{tmp_path}'", tmp_path / "preset"
    assert re.match(f"{said}$", error_of(tmp_path))
    within.mkdir()  # as in the folder of a run
    assert re.match(f"{said}$", error_of(tmp_path))
    (within / "config.json").write_text("{}")
    assert re.match(f"{said}.*'{within}'", error_of(tmp_path))


def test_what_is_no_name():
    assert re.match("`preset`.*preset=None$", error_of(None))


@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        ("google/switch-base8", ["hf://google/switch-base-8"]),
        ("t5_large", ["hf://google-t5/t5-large"]),
        ("switch_mini", ["switch_mini_en"]),
        ("qqq", []),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, suggestions):
    allowed, _, suggested = error_of(name).partition(f"preset={name!r}")
    assert re.match(f"`preset`.*{', '.join(sorted(SHIPPED))}", allowed)
    assert re.findall("'(.*)'", suggested) == suggestions


def test_a_preset_that_comes_with_the_library(preset, monkeypatch):
    monkeypatch.setattr("zoo.presets.shipped", lambda: {"tiny_en": preset})
    assert zoo.from_preset("tiny_en").num_classes == 2
    assert re.match("`preset`.*tiny_en.*preset='tiny'", error_of("tiny"))


def test_the_hub_is_asked(preset, monkeypatch):
    asked = []
    monkeypatch.setattr("zoo.presets.download", lambda *given: asked.append(given) or preset)
    assert zoo.from_preset("hf://owner/model").num_classes == 2
    assert zoo.from_preset("hf://owner/model", load_weights=False).num_classes == 2
    assert asked == [("hf://owner/model", True), ("hf://owner/model", False)]


class TestBackbonePreset:
    """What `backbone.save_to_preset` writes: without a task, and without a tokenizer."""

    WIDTHS = {
        "vocabulary_size": 10,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 4,
        "key_dim": 2,
        "intermediate_dim": 4,
    }

    @pytest.mark.parametrize(
        ("backbone", "task"),
        [
            (zoo.EncoderDecoderBackbone, zoo.Seq2SeqLM),
            (zoo.DecoderBackbone, zoo.CausalLM),
        ],
    )
    def test_of_a_language_model(self, backbone, task, tmp_path):
        saved = backbone(**self.WIDTHS)
        saved.save_to_preset(str(tmp_path))
        model = zoo.from_preset(tmp_path)
        assert type(model) is task and model.preprocessor is None
        for ours, before in zip(model.backbone.weights, saved.weights, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, before)))
        assert re.match("`num_classes`.*None.*num_classes=2", error_of(tmp_path, num_classes=2))

    def test_the_tokenizer_is_loaded_where_there_is_one(self, tmp_path):
        backbone = zoo.EncoderDecoderBackbone(**(self.WIDTHS | {"vocabulary_size": 8000}))
        backbone.save_to_preset(str(tmp_path))
        zoo.default_tokenizer().save_to_preset(str(tmp_path))
        assert zoo.from_preset(tmp_path).preprocessor.tokenizer.vocabulary_size() == 8000

    def test_a_head_that_is_not_there(self, tmp_path):
        zoo.moe_lstm(vocabulary_size=10, num_experts=4).backbone.save_to_preset(str(tmp_path))
        assert re.match("`preset`.*'task.weights.h5'", error_of(tmp_path))

    @pytest.mark.parametrize("name", ["config.json", "task.json"])
    @pytest.mark.parametrize("registered", ["keras>Dense", "zoo>ZooTokenizer", "zoo>Nothing"])
    def test_something_else(self, name, registered, tmp_path):
        zoo.EncoderBackbone(**self.WIDTHS).save_to_preset(str(tmp_path))
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / name).write_text(json.dumps(config | {"registered_name": registered}))
        message = error_of(tmp_path, num_classes=2)
        assert re.match(f"`preset`.*{registered!r}.*{name!r}", message)


class TestListPresets:
    # https://github.com/google-research/text-to-text-transfer-transformer/blob/main/released_checkpoints.md
    T5_1_1 = {
        size: {
            "vocabulary_size": 32128,
            "num_layers": layers,
            "num_heads": heads,
            "hidden_dim": width,
            "key_dim": 64,
            "intermediate_dim": hidden,
            "gated": True,
            "tie_embeddings": False,
        }
        for size, (layers, heads, width, hidden) in {
            "small": (8, 6, 512, 1024),
            "base": (12, 12, 768, 2048),
            "large": (24, 16, 1024, 2816),
            "xl": (24, 32, 2048, 5120),
            "xxl": (24, 64, 4096, 10240),
        }.items()
    }

    def test_sizes_are_those_of_the_models(self):
        for preset in zoo.list_presets()[len(SHIPPED) :]:
            name = preset.name.rpartition("/")[2]
            kind, _, size = name.partition("-")
            with Deferred():
                if name == "switch-c-2048":
                    backbone = zoo.switch_transformer(size)
                elif kind == "switch":
                    width, _, experts = size.partition("-")
                    backbone = zoo.switch_transformer(width, num_experts=int(experts))
                elif preset.kind == "T5 1.1":
                    backbone = zoo.EncoderDecoderBackbone(**self.T5_1_1[size.split("-")[1]])
                else:
                    backbone = zoo.dense_transformer(size)
            ours = zoo.figures(backbone)
            assert preset.parameters == ours.parameters, preset.name
            assert preset.active_parameters == ours.active_parameters, preset.name

    def test_the_rest(self):
        presets = zoo.list_presets()
        assert len({preset.name for preset in presets}) == len(presets)
        for preset in presets[len(SHIPPED) :]:
            assert preset.name.startswith("hf://") and preset.licence == "Apache-2.0"
            assert preset.kind in ("T5", "T5 1.1", "Switch Transformer")
            assert "C4" in preset.training_data
            is_switch = preset.kind == "Switch Transformer"
            assert preset.file_bytes == (None if is_switch else 4 * preset.parameters)
        assert {"hf://google/switch-xxl-128", "hf://google/t5-v1_1-xxl"} < {p.name for p in presets}


class TestShipped:
    def test_are_the_ones_listed_first(self):
        listed = zoo.list_presets()[: len(SHIPPED)]
        assert {preset.name for preset in listed} == set(shipped()) == set(SHIPPED)
        for preset in listed:
            size = sum(file.stat().st_size for file in shipped()[preset.name].glob("*.h5"))
            assert size == pytest.approx(preset.file_bytes, rel=0.05)

    def test_scores_are_those_that_were_measured(self):
        from benchmarks import glue

        measured = json.loads(glue.KEPT.read_text())["scores"]
        model_of = {preset: model for model, preset in glue.TWINS.items()}
        for preset in zoo.list_presets()[: len(SHIPPED)]:
            assert len(preset.scores) == 4
            for task, score in preset.scores.items():
                runs = measured[task][f"{model_of[preset.name]}-pretrained"]["runs"]
                right = np.mean([run["best"][get(task).primary] for run in runs])
                assert score == pytest.approx(right, abs=0.0006)

    @pytest.mark.parametrize("name", marked(SHIPPED, "switch_mini_en"))
    def test_guess_words_that_are_hidden_from_them(self, name):
        """One untrained guesses any of 8,192 with a cross-entropy of 9."""
        model = zoo.from_preset(name)
        (preset,) = (preset for preset in zoo.list_presets() if preset.name == name)
        sizes = zoo.figures(model.backbone)
        assert preset.parameters == sizes.parameters
        assert preset.active_parameters == sizes.active_parameters
        tokenizer = model.preprocessor.tokenizer
        sentinel = tokenizer.vocabulary_size() - 1
        tokens = np.array([tokenizer(TEXT)])
        places = np.array([range(3, tokens.shape[1] - 3, 7)])
        hidden = tokens.copy()
        np.put_along_axis(hidden, places, sentinel, axis=1)
        logits = model.predict(
            {
                "token_ids": hidden,
                "padding_mask": np.ones_like(hidden),
                "mask_positions": places,
            },
            verbose=0,
        )
        labels = np.take_along_axis(tokens, places, axis=1)
        loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        assert float(ops.mean(loss)) < 4


class TestSavePreset:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("presets") / "tiny"
        backbone = zoo.switch_transformer(
            "mini",
            num_experts=2,
            num_layers=2,
            num_decoder_layers=1,
            hidden_dim=8,
            intermediate_dim=12,
        )
        model = zoo.Seq2SeqLM(backbone, zoo.Seq2SeqLMPreprocessor(zoo.default_tokenizer(), 8, 6))
        facts = {"licence": "apache-2.0", "training_data": "None.", "scores": {"loss": 1.25}}
        zoo.save_preset(model, folder, **facts)
        return folder

    def test_loads_and_has_a_card(self, folder):
        model = zoo.from_preset(folder, dtype="bfloat16")
        assert isinstance(model, zoo.Seq2SeqLM)
        assert model.backbone.compute_dtype == "bfloat16"
        assert isinstance(model.generate(["a fox"], max_length=4)[0], str)
        card = (folder / "README.md").read_text()
        sizes = zoo.figures(model.backbone)
        for line in (
            "license: apache-2.0",
            "# tiny",
            f"| parameters | {sizes.parameters:,} |",
            f"| of them active for a token | {sizes.active_parameters:,} |",
            "| training data | None. |",
            "| loss | 1.25 |",
        ):
            assert line in card.splitlines()
        assert "not stated" in zoo.model_card(model, "tiny")

    def test_every_file_is_checked(self, folder, tmp_path):
        hashes = json.loads((folder / "sha256.json").read_text())
        assert {"config.json", "task.json", "model.weights.h5"} < set(hashes)
        assert "assets/tokenizer/vocabulary.spm" in hashes
        for name in hashes:
            copy = tmp_path / name.replace("/", "-")
            shutil.copytree(folder, copy)
            content = (copy / name).read_bytes()
            (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert Path(name).name in error_of(copy)
            (copy / name).unlink()
            assert error_of(copy)
        shutil.copytree(folder, tmp_path / "hashes")
        for text in ("{", "[]"):
            (tmp_path / "hashes" / "sha256.json").write_text(text)
            assert re.match("'sha256.json' must hold", error_of(tmp_path / "hashes"))
        for name in ("../hashes/config.json", str(folder / "config.json"), "nothing"):
            hashes = {name: sha256(folder / "config.json")}
            (tmp_path / "hashes" / "sha256.json").write_text(json.dumps(hashes))
            assert re.match(f"`preset`.*{name!r}", error_of(tmp_path / "hashes"))

    def test_the_card_may_be_edited(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / "README.md").write_text("mine")
        zoo.from_preset(tmp_path / "copy")

    def test_a_failure_leaves_nothing(self, folder, tmp_path):
        model = zoo.from_preset(folder)
        with pytest.raises(ValueError, match="`scores`.*scores=.*'low'"):
            zoo.save_preset(model, tmp_path / "new", scores={"loss": "low"})
        assert not any(tmp_path.iterdir())

    def test_a_folder_that_is_there(self, folder):
        with pytest.raises(ValueError, match=f"`folder`.*folder='{folder}'"):
            zoo.save_preset(zoo.from_preset(folder), folder)

    def test_what_is_no_task(self, folder, tmp_path):
        backbone = zoo.from_preset(folder, load_weights=False).backbone
        with pytest.raises(ValueError, match="`model`.*EncoderDecoderBackbone"):
            zoo.save_preset(backbone, tmp_path / "new")
        assert not any(tmp_path.iterdir())

    def test_scores_are_numbers(self, folder, tmp_path):
        model = zoo.from_preset(folder, load_weights=False)
        with pytest.raises(ValueError, match="`scores`.*scores={'a': 'b'}"):
            zoo.save_preset(model, tmp_path / "new", scores={"a": "b"})
        assert not any(tmp_path.iterdir())

    def test_a_language_model_has_no_classes(self, folder):
        assert re.match("`num_classes`.*None.*num_classes=2", error_of(folder, num_classes=2))

    def test_upload(self, folder, monkeypatch):
        """KerasHub takes the card of the folder it is given away."""
        sent, before = [], (folder / "README.md").read_bytes()

        def upload_preset(address, copy):
            sent.append((address, sorted(path.name for path in Path(copy).iterdir())))
            shared = Path(copy, "model.weights.h5").samefile(folder / "model.weights.h5")
            assert shared  # and its content not copied
            (Path(copy) / "README.md").write_text("KerasHub's")
            (Path(copy) / "README.md").unlink()

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            sent.append((repo_id, path_in_repo, Path(path_or_fileobj).read_bytes()))

        monkeypatch.setattr("keras_hub.upload_preset", upload_preset)
        monkeypatch.setattr("huggingface_hub.HfApi.upload_file", upload_file)
        zoo.upload(folder, "hf://me/tiny")
        names = sorted(path.name for path in folder.iterdir())
        assert sent == [("hf://me/tiny", names), ("me/tiny", "README.md", before)]
        assert (folder / "README.md").read_bytes() == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_what_is_not_uploaded(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("keras_hub.upload_preset", None)
        for address in ("tiny", "hf://me/tiny@main"):
            with pytest.raises(ValueError, match=f"`address`.*{address!r}"):
                zoo.upload(folder, address)

        def fails(name, content, message):
            copy = shutil.copytree(folder, tmp_path / name)
            (copy / name).unlink(missing_ok=True)
            if content is not None:
                (copy / name).write_bytes(content)
            with pytest.raises(ValueError, match=message):
                zoo.upload(copy, "hf://me/tiny")

        fails("config.json", None, "`folder`.*`config.json`")
        fails("model.weights.h5", b"another", "'model.weights.h5'")
        for name in ("optimizer.pt", "pytorch_model.bin", "data.pkl"):
            fails(name, b"", f"`folder`.*{name!r}")

    def test_an_upload_without_links(self, folder, monkeypatch):
        """As on file systems that have none."""

        def no_link(source, target):
            raise OSError

        def upload_preset(address, copy):
            copied = Path(copy, "model.weights.h5")
            assert copied.read_bytes() == (folder / "model.weights.h5").read_bytes()

        monkeypatch.setattr("os.link", no_link)
        monkeypatch.setattr("keras_hub.upload_preset", upload_preset)
        monkeypatch.setattr("huggingface_hub.HfApi.upload_file", lambda *args, **kwargs: None)
        zoo.upload(folder, "hf://me/tiny")


class TestTransformersFolder:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A Switch Transformer with a tokenizer, as transformers would have written it."""
        folder = tmp_path_factory.mktemp("theirs") / "model"
        router = keras_moe.SwitchRouter(capacity_factor=None, eval_capacity_factor=None)
        options = {"num_layers": 2, "num_decoder_layers": 2, "hidden_dim": 8, "key_dim": 4}
        options |= {"gated": False, "activation": "relu"}  # as transformers has Switch's experts
        backbone = zoo.switch_transformer(
            "mini", num_experts=2, router=router, intermediate_dim=12, **options
        )
        save_transformers(zoo.Seq2SeqLM(backbone), folder)
        (folder / "spiece.model").write_bytes(zoo.default_tokenizer().proto)
        return folder

    def test_is_loaded_with_its_tokenizer(self, folder):
        model = zoo.from_preset(folder)
        assert model.preprocessor.tokenizer.vocabulary_size() == 8100
        assert isinstance(model.generate("a <extra_id_0> fox", max_length=4), str)
        with pytest.raises(ValueError, match="`num_classes`.*None.*num_classes=2"):
            zoo.from_preset(folder, num_classes=2)

    def test_without_weights_they_are_as_initialized(self, folder):
        loaded, fresh = zoo.from_preset(folder), zoo.from_preset(folder, load_weights=False)
        pairs = zip(loaded.trainable_variables, fresh.trainable_variables, strict=True)
        equal = [np.array_equal(*map(keras.ops.convert_to_numpy, pair)) for pair in pairs]
        assert not all(equal) and loaded.count_params() == fresh.count_params()

    def test_a_vocabulary_that_does_not_fit(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy")
        bytes_ = zoo.t5_tokenizer(zoo.default_tokenizer().proto, sentinels=200).proto
        (tmp_path / "copy" / "spiece.model").write_bytes(bytes_)
        assert re.search("copy'.*tokenizer.*8200.*8192", error_of(tmp_path / "copy"))

    def test_a_vocabulary_that_is_far_too_small(self, folder, tmp_path):
        """As with the file of another model: 128 rows or more would have no piece."""
        shutil.copytree(folder, tmp_path / "copy")
        for sentinels, fits in ((65, True), (64, False)):
            proto = zoo.t5_tokenizer(zoo.default_tokenizer().proto, sentinels=sentinels).proto
            (tmp_path / "copy" / "spiece.model").write_bytes(proto)
            if fits:
                zoo.from_preset(tmp_path / "copy", load_weights=False)
            else:
                assert re.search("copy'.*tokenizer.*8064.*8192", error_of(tmp_path / "copy"))

    def test_a_config_alone_is_a_model_without_weights(self, folder, tmp_path):
        shutil.copy(folder / "config.json", tmp_path)
        model = zoo.from_preset(tmp_path, load_weights=False)
        assert model.preprocessor is None and model.backbone.hidden_dim == 8
        assert re.search("'model.safetensors'.*'pytorch_model.bin'", error_of(tmp_path))

    def test_a_model_without_rows_for_the_sentinels(self, folder, tmp_path):
        backbone = zoo.from_preset(folder, load_weights=False).backbone
        config = {**backbone.get_config(), "vocabulary_size": 8000}
        preprocessor = zoo.Seq2SeqLMPreprocessor(zoo.default_tokenizer(), 8, 6)
        model = zoo.Seq2SeqLM(type(backbone).from_config(config), preprocessor)
        with pytest.raises(ValueError, match="8100.*vocabulary_size=8000"):
            save_transformers(model, tmp_path / "out")
        assert not any(tmp_path.iterdir())
