"""Whole checkpoints: those of Switch Transformers and Mixtral stand for all families."""

import io
import json
import pathlib
import re
import threading

import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops
from safetensors.numpy import load_file, save_file

import zoo
from tests.zoo.conversion import small_decoders
from tests.zoo.conversion.small_t5 import INPUTS, SWITCH, close, pickled, run_theirs, theirs
from tests.zoo.quantizing import quantize
from zoo.conversion import load_transformers, save_transformers, tensors
from zoo.conversion.folder import has_tokenizer, read_config
from zoo.models.deferred import Deferred


def test_shards_and_pickles(tmp_path):
    model = theirs("switch")
    expected = run_theirs(model).logits
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    close(load_transformers(tmp_path / "shards").predict(INPUTS, verbose=0), expected)

    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "shards" / "config.json").read_text())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    close(load_transformers(folder).predict(INPUTS, verbose=0), expected)


def test_shards_of_pickles(tmp_path):
    model = theirs("switch")
    pickled(model, tmp_path)
    close(load_transformers(tmp_path).predict(INPUTS, verbose=0), run_theirs(model).logits)


def test_without_weights_no_file_of_them_is_needed(tmp_path):
    for tied in (True, False):
        options = {**SWITCH, "tie_word_embeddings": tied}
        transformers.SwitchTransformersConfig(**options).save_pretrained(tmp_path)
        backbone = load_transformers(tmp_path, load_weights=False).backbone
        assert backbone.tie_embeddings == tied and backbone.num_layers == 4
        assert np.isfinite(ops.convert_to_numpy(backbone.token_embedding.embeddings)).all()


def test_shards_are_opened_one_after_another(tmp_path, monkeypatch):
    """In order for the shapes, and again for the values."""
    model = theirs("t5")
    copies = [*tensors.ALIASES["shared.weight"], "lm_head.weight"]  # which would be compared
    pickled(model, tmp_path, num_shards=3, without=copies)
    opened = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **kw: opened.append(path.name[14:19]) or load(path, **kw)
    )
    load_transformers(tmp_path)
    assert opened == ["00001", "00002", "00003"] * 2


def test_the_files_are_closed_when_nobody_reads_them_any_more(tmp_path, monkeypatch):
    theirs("t5").save_pretrained(tmp_path)
    seen, open_path = [], pathlib.Path.open

    class Shard(io.FileIO):
        def close(self):
            seen.append([t.name for t in threading.enumerate() if "ThreadPool" in t.name])
            super().close()

    def open_(path, *args, **kwargs):
        is_shard = path.suffix == ".safetensors"
        return Shard(path) if is_shard else open_path(path, *args, **kwargs)

    def initialize(deferred, values=()):
        next(iter(values))
        raise RuntimeError("no memory")

    monkeypatch.setattr(Deferred, "initialize", initialize)
    monkeypatch.setattr(pathlib.Path, "open", open_)
    with pytest.raises(RuntimeError, match="no memory"):
        load_transformers(tmp_path)
    assert seen == [[]]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle of an old version"])
def test_bfloat16(safe, tmp_path):
    """Half of the bits, kept as they are, in the dtype that is asked for."""
    model = theirs("switch").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        weights = {name: torch.nn.Parameter(w) for name, w in model.state_dict().items()}
        path = tmp_path / "pytorch_model.bin"
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    loaded = load_transformers(tmp_path, dtype="bfloat16")
    embeddings = loaded.backbone.token_embedding.embeddings
    assert embeddings.dtype == "bfloat16"
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(embeddings, "float32")), model.shared.weight.float().detach()
    )
    ours = loaded.predict(INPUTS, verbose=0)
    assert np.isfinite(ours.astype("float32")).all()


def test_experts_of_several_dtypes(tmp_path):
    small_decoders.theirs("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].astype("float16")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    bank = load_transformers(tmp_path).backbone.blocks[0].feed_forward.experts
    np.testing.assert_array_equal(ops.convert_to_numpy(bank.kernel_gate[1]).T, tensors[name])


def test_bfloat16_there_and_back(tmp_path):
    small_decoders.theirs("olmoe").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs", dtype="auto")
    assert loaded.backbone.blocks[0].feed_forward.experts.kernel_in.dtype == "bfloat16"
    save_transformers(loaded, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    ours, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "theirs"))
    assert set(ours) == set(expected)
    for name in ours:
        np.testing.assert_array_equal(ours[name], expected[name])


def test_auto_is_the_dtype_of_the_files(tmp_path):
    """And where they are not read, what the config says of them."""
    small_decoders.theirs("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), "dtype": None}
    cases = ({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16")
    for entry, expected in (*cases, ({}, keras.config.floatx())):
        given = {name: value for name, value in config.items() if name != "dtype"} | entry
        path.write_text(json.dumps(given))
        assert zoo.from_preset(tmp_path, dtype="auto").compute_dtype == "float32"
        without = zoo.from_preset(tmp_path, dtype="auto", load_weights=False)
        assert without.compute_dtype == expected
    path.write_text(json.dumps({**config, "dtype": "int8"}))
    with pytest.raises(ValueError, match="`dtype`.*dtype='int8'"):
        load_transformers(tmp_path, dtype="auto", load_weights=False)


def test_lora_is_written_into_the_kernels(tmp_path):
    """Of queries and values, whose own kernels stay as they were."""
    model = small_decoders.theirs("mixtral")
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    loaded.backbone.enable_lora(2)
    rng = np.random.default_rng(0)
    for variable in loaded.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    save_transformers(loaded, tmp_path / "ours")
    ours, before = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "theirs"))
    changed = {name for name in before if (ours[name] != before[name]).any()}
    assert changed == {
        f"model.layers.{n}.self_attn.{part}_proj.weight" for n in (0, 1) for part in "qv"
    }
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    inputs, valid = small_decoders.INPUTS, small_decoders.VALID
    scores = loaded.predict(inputs, verbose=0)[valid]
    expected = small_decoders.run_theirs(again).logits[torch.tensor(valid)]
    small_decoders.close(scores, expected)
    before = small_decoders.run_theirs(model).logits[torch.tensor(valid)]
    assert (expected - before).abs().max() > 0.1
    merged = load_transformers(tmp_path / "ours")
    np.testing.assert_allclose(
        merged.predict(inputs, verbose=0)[valid], scores, rtol=1e-5, atol=1e-5
    )


def test_lora_of_an_encoder_with_a_decoder(tmp_path):
    """Also in the attention of the decoder to the encoder."""
    model = theirs("switch")
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    loaded.backbone.enable_lora(2)
    assert len(loaded.trainable_variables) == 2 * 2 * (4 + 2 + 2)
    rng = np.random.default_rng(0)
    for variable in loaded.trainable_variables:
        variable.assign(0.3 * rng.normal(size=variable.shape))
    save_transformers(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    close(loaded.predict(INPUTS, verbose=0), run_theirs(again).logits)


def test_what_is_quantized_is_not_written(tmp_path):
    small_decoders.theirs("mixtral").save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    quantize(loaded)
    with pytest.raises(ValueError, match=r"'model\.layers.*\.weight'.*dtype='int8'"):
        save_transformers(loaded, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_is_written_beside_the_weights(tmp_path):
    theirs("switch").save_pretrained(tmp_path / "theirs")
    save_transformers(load_transformers(tmp_path / "theirs"), tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    special = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert special == {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}


def test_read_config_and_has_tokenizer(tmp_path):
    config = transformers.SwitchTransformersConfig(**SWITCH)
    config.save_pretrained(tmp_path)
    assert read_config(str(tmp_path))["num_experts"] == 3
    assert not has_tokenizer(str(tmp_path))
    (tmp_path / "spiece.model").touch()
    assert has_tokenizer(tmp_path)


def test_dtypes_of_the_layers(tmp_path):
    """Whatever the files have: policies are no dtypes, and `None` is Keras' own."""
    theirs("t5").half().save_pretrained(tmp_path)
    for dtype, compute, stored in (
        ("float32", "float32", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        (None, "float32", "float32"),
    ):
        backbone = load_transformers(tmp_path, dtype).backbone
        assert backbone.compute_dtype == compute
        assert backbone.token_embedding.embeddings.dtype == stored


class TestNotThere:
    def test_shards_of_no_size(self, tmp_path):
        with pytest.raises(ValueError, match="`shard_bytes`.*shard_bytes='5GB'"):
            save_transformers(keras.Sequential(), tmp_path / "out", shard_bytes="5GB")

    def test_another_model(self, tmp_path):
        with pytest.raises(ValueError, match="`model`.*`zoo.CausalLM`.*Sequential"):
            save_transformers(keras.Sequential(), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_there(self, tmp_path):
        """Before anything else is looked at."""
        with pytest.raises(ValueError, match=f"`folder`.*folder='{tmp_path}'"):
            save_transformers(keras.Sequential(), tmp_path)

    def test_nothing_is_left_of_a_folder_that_could_not_be_written(self, tmp_path, monkeypatch):
        theirs("t5").save_pretrained(tmp_path / "theirs")
        loaded = load_transformers(tmp_path / "theirs")
        monkeypatch.setattr("zoo.conversion.folder.write", lambda *arguments: {}["disk"])
        with pytest.raises(KeyError, match="disk"):
            save_transformers(loaded, tmp_path / "ours")
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        theirs("switch").save_pretrained(tmp_path / "model", max_shard_size="20KB")
        return tmp_path / "model"

    def fails(self, folder, message):
        with pytest.raises(ValueError, match=message) as error:
            load_transformers(folder)
        assert "\n" not in str(error.value)

    def change(self, folder, **options):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    def test_no_folder(self, tmp_path):
        message = "`folder`.*`config.json`.*`zoo.from_preset`.*folder='.*none'"
        self.fails(tmp_path / "none", message)

    def test_another_family(self, folder):
        self.change(folder, model_type="bert")
        self.fails(folder, "t5.*switch_transformers.*mixtral.*model_type='bert'")

    def test_a_model_that_writes_no_texts(self, folder):
        self.change(folder, architectures=["SwitchTransformersEncoderModel"])
        self.fails(folder, "ForCausalLM.*architectures=.'SwitchTransformersEncoderModel'")

    def test_config_that_is_no_json(self, folder):
        for content in ("{", "[" * 10**5, '{"a":' * 10**5, "[1]", "9" * 5000, "\xe0", ""):
            (folder / "config.json").write_bytes(content.encode("latin-1"))
            self.fails(folder, "^'config.json' must hold a JSON object.*model/config.json")
        (folder / "config.json").write_text("{}")
        self.fails(folder, "`config.json`.*`model_type`")

    @pytest.mark.parametrize("kinds", [True, 3, 2.5, "T5ForConditionalGeneration", {"a": 1}, [1]])
    def test_architectures_that_are_no_names(self, folder, kinds):
        self.change(folder, architectures=kinds)
        self.fails(folder, f"architectures=.?{re.escape(str(kinds)[:1])}")

    @pytest.mark.parametrize("kind", ["folder", "broken link"])
    def test_a_file_that_is_none(self, folder, kind):
        """It is not taken for one that is missing."""
        for name in ("spiece.model", "config.json", "model.safetensors.index.json"):
            path = folder / name
            path.unlink(missing_ok=True)
            path.mkdir() if kind == "folder" else path.symlink_to("nothing")
            self.fails(folder, f"'{name}' must be a file.*{kind}")
            path.rmdir() if kind == "folder" else path.unlink()
            if name == "config.json":
                transformers.SwitchTransformersConfig(**SWITCH).save_pretrained(folder)

    @pytest.mark.parametrize("name", ["num_layers", "num_decoder_layers", "num_experts", "d_ff"])
    def test_a_huge_size(self, folder, name):
        """It is refused before a model of that size is made."""
        for size in (10**9, 2**31, 10**30):
            self.change(folder, **{name: size})
            self.fails(folder, name if name != "d_ff" or size > 2**31 - 1 else r"wi\.weight")

    @pytest.mark.parametrize("name", ["dropout_rate", "router_jitter_noise"])
    def test_a_rate_that_is_none(self, folder, name):
        for rate in (1, 2.5, "0.1", float("nan"), 1e999):
            self.change(folder, **{name: rate})
            self.fails(folder, f"`{name}`.*below 1.*{name}=")

    def test_vocabulary_of_another_size(self, folder):
        self.change(folder, vocab_size=41)
        self.fails(folder, r"'shared.weight'.*\(40, 16\).*\(41, 16\)")

    def test_more_experts_than_there_are(self, folder):
        self.change(folder, num_experts=4)
        self.fails(folder, r"'.*expert_3\.wi\.weight'.*\b5\b")

    def test_fewer_experts_than_there_are(self, folder):
        self.change(folder, num_experts=2)
        self.fails(folder, r"'.*expert_2\.wi\.weight'.*\b5\b")

    def test_a_shard_cut_short(self, folder):
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        self.fails(folder, f"damaged.*'{shard.name}'")

    def test_a_shard_that_is_cut_while_it_is_read(self, folder, monkeypatch):
        """Nothing is returned, and the reader's thread is gone."""
        shard = sorted(folder.glob("model-*.safetensors"))[-1]
        initialize = Deferred.initialize

        def cut(deferred, values=()):
            shard.write_bytes(shard.read_bytes()[:-1])
            initialize(deferred, values)

        monkeypatch.setattr(Deferred, "initialize", cut)
        self.fails(folder, f"damaged.*'{shard.name}'")
        assert not [t.name for t in threading.enumerate() if "ThreadPool" in t.name]

    def test_no_embedding_table(self, folder):
        (folder / "model.safetensors.index.json").unlink()
        for shard in folder.glob("model-*"):
            shard.unlink()
        save_file({"lm_head.weight": np.ones((40, 16))}, folder / "model.safetensors")
        self.fails(folder, "'shared.weight'$")
