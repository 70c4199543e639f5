"""Small tokenizers in the files of published Mixtrals and OLMoEs, against transformers itself."""

import io
import json
import re
import shutil
import warnings

import keras
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import zoo
from tests.zoo.conversion.test_decoders import theirs
from zoo.conversion import load_transformers, save_transformers
from zoo.conversion.tokenizers import FILES, TransformersTokenizer
from zoo.presets import require_generation

CORPUS = ["The year 12345 isn't 2024. HELLO'S café naïve", "  two  spaces\n\nand lines 67890"] * 30
TEXTS = [
    *CORPUS[:2],
    "",
    " the cafe\u0301, 1234567890 and 日本 🙂",
    "<s> x</s>y <extra>z <|endoftext|>a<|padding|>    b\t\n ",
]
ROWS = 400


def mixtral_tokenizer(folder):
    """The published one prepends a space and then is SentencePiece's, with a start token."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}, space]
    file |= {"normalizer": {"type": "Sequence", "normalizers": before}, "pre_tokenizer": None}
    file["model"]["unk_token"] = "<unk>"
    (folder / "tokenizer.json").write_text(json.dumps(file))


def olmoe_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|padding|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.GPTNeoXTokenizer(model["vocab"], merges, bos_token=None)
    tokenizer.add_tokens(["    ", "   ", "  ", "<extra>"])  # spaces, as GPT-NeoX has them
    tokenizer.save_pretrained(folder)


TOKENIZERS = {"mixtral": mixtral_tokenizer, "olmoe": olmoe_tokenizer}
IDS = {"mixtral": (1, 2, None), "olmoe": (None, 0, 1)}
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.fixture(scope="module", params=TOKENIZERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    ids = dict(zip(NAMES, IDS[family], strict=True))
    model = theirs(family, vocab_size=ROWS, max_position_embeddings=48, **ids)
    model.save_pretrained(folder)
    TOKENIZERS[family](folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load_transformers(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **entries):
    there = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**there, **entries}))


def expected_ids(reference, texts=TEXTS):
    return [reference(text, add_special_tokens=False)["input_ids"] for text in texts]


class TestIds:
    def test_are_those_of_transformers(self, loaded, reference):
        tokenizer, expected = loaded.preprocessor.tokenizer, expected_ids(reference)
        assert tokenizer(TEXTS) == tokenizer(np.array(TEXTS)) == expected
        for text, ids in zip(TEXTS, expected, strict=True):
            one = tokenizer(text)
            assert one.dtype == "int32" and list(one) == list(tokenizer(text.encode())) == ids
        assert tokenizer.vocabulary_size() == max(reference.get_vocab().values()) + 1 < ROWS
        assert tokenizer.token_to_id("<extra>") == reference.convert_tokens_to_ids("<extra>")
        assert tokenizer.id_to_token(5) == tokenizer.get_vocabulary()[5]

    def test_are_those_of_sentencepiece(self, family, folder, loaded):
        if family != "mixtral":
            pytest.skip("OLMoE has no SentencePiece model")
        proto = (folder / "tokenizer.model").read_bytes()
        pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        for text in TEXTS[:-1]:  # it reads no special tokens
            assert list(loaded.preprocessor.tokenizer(text)) == pieces.encode(text)

    def test_back_to_texts(self, family, loaded, reference):
        tokenizer = loaded.preprocessor.tokenizer
        expected = expected_ids(reference)
        texts = tokenizer.detokenize(expected)
        assert texts == [reference.decode(ids) for ids in expected]
        assert texts[:3] == TEXTS[:3]
        assert tokenizer.detokenize(np.array(expected[0])) == TEXTS[0]
        assert tokenizer.detokenize(tf.ragged.constant(expected)) == texts

    def test_in_a_pipeline_of_tensorflow(self, loaded, reference):
        tokenizer = loaded.preprocessor.tokenizer
        data = tf.data.Dataset.from_tensor_slices(TEXTS)
        assert [list(ids.numpy()) for ids in data.map(tokenizer)] == expected_ids(reference)
        batches = [x.to_list() for x in data.batch(3).map(tokenizer)]
        assert sum(batches, []) == expected_ids(reference)
        packed = next(iter(data.batch(5).map(loaded.preprocessor)))
        direct = loaded.preprocessor(TEXTS)
        np.testing.assert_array_equal(packed[0]["token_ids"], direct[0]["token_ids"])
        np.testing.assert_array_equal(packed[1], direct[1])

    def test_what_is_no_text(self, loaded):
        for inputs in (3, ["a", 3], [["a"]]):
            with pytest.raises(ValueError, match=f"`inputs`.*{re.escape(repr(inputs))}"):
                loaded.preprocessor.tokenizer(inputs)


class TestModel:
    def test_prompts_start_as_there(self, family, loaded, reference):
        inputs = loaded.preprocessor.generate_preprocess(TEXTS, sequence_length=48)
        inputs = [keras.ops.convert_to_numpy(inputs[n]) for n in ("token_ids", "padding_mask")]
        expected = reference(TEXTS)["input_ids"]
        for ids, mask, there in zip(*inputs, expected, strict=True):
            assert list(ids[: mask.sum()]) == there[:48]
        assert loaded.preprocessor.add_start_token == (family == "mixtral")
        assert loaded.preprocessor.sequence_length == 48

    def test_generated_texts_agree(self, folder, loaded, reference):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = reference("The year", return_tensors="pt")
        nothing = list(range(len(reference), ROWS))  # ids without a token, never written here
        options = {"max_length": 12, "do_sample": False, "suppress_tokens": nothing}
        with torch.no_grad():
            written = model.generate(**ids, **options)[0]
        expected = reference.decode(written, skip_special_tokens=True)
        assert loaded.generate("The year", max_length=12) == expected
        assert expected.startswith("The year") and len(expected) > len("The year")

    def test_survives_as_a_preset(self, family, loaded, reference, tmp_path):
        zoo.save_preset(loaded, tmp_path / "preset")
        require_generation(tmp_path / "preset")
        model = zoo.from_preset(tmp_path / "preset")
        tokenizer, before = model.preprocessor.tokenizer, loaded.preprocessor.tokenizer
        assert tokenizer(TEXTS) == expected_ids(reference)
        assert tokenizer.files == before.files
        assert sorted(tokenizer.special_token_ids) == sorted(before.special_token_ids)
        assert model.preprocessor.add_start_token == (family == "mixtral")
        ids = dict(zip(NAMES, IDS[family], strict=True))
        assert model.backbone.facts == {"max_position_embeddings": 48, **ids}
        ours, there = (m.preprocessor.generate_preprocess(TEXTS) for m in (model, loaded))
        np.testing.assert_array_equal(ours["token_ids"], there["token_ids"])

    def test_written_back_transformers_loads_it(self, family, folder, loaded, tmp_path):
        save_transformers(loaded, tmp_path / "ours")
        for name in FILES:
            if (folder / name).is_file():
                assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes()
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
        assert again(TEXTS) == transformers.AutoTokenizer.from_pretrained(folder)(TEXTS)
        config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
        generation = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
        for there in (config, generation):
            assert tuple(getattr(there, name) for name in NAMES) == IDS[family]
        assert config.max_position_embeddings == 48

    def test_without_its_files_the_ids_are_kept(self, family, folder, copy, tmp_path):
        for name in FILES:
            (copy / name).unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = load_transformers(copy)
        assert model.preprocessor is None
        with pytest.raises(ValueError, match="`preset`.*tokenizer.*preset='.*copy'"):
            require_generation(copy)
        save_transformers(model, tmp_path / "ours")
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert tuple(config[name] for name in NAMES) == IDS[family]

    def test_another_tokenizer_says_its_ids(self, tmp_path, folder):
        backbone = load_transformers(folder, load_weights=False).backbone
        config = {**backbone.get_config(), "vocabulary_size": 8000, "facts": None}
        preprocessor = zoo.CausalLMPreprocessor(zoo.default_tokenizer(), 8)
        model = zoo.CausalLM(zoo.DecoderBackbone.from_config(config), preprocessor)
        save_transformers(model, tmp_path / "ours")
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert tuple(config[name] for name in NAMES) == (1, 1, 0)
        assert "max_position_embeddings" not in config
        assert not (tmp_path / "ours" / "tokenizer.json").exists()


class TestSettings:
    """What `tokenizer_config.json` and its like say beside `tokenizer.json`."""

    def agrees(self, folder):
        ours = load_transformers(folder, load_weights=False).preprocessor.tokenizer
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        texts = [*TEXTS, "a [PAD]b<mine> c<other>  d"]
        assert ours(texts) == expected_ids(reference, texts)
        assert ours.end_token_id == reference.eos_token_id
        assert ours.pad_token_id == reference.pad_token_id
        return ours

    @pytest.mark.parametrize(
        "entries",
        [
            {"pad_token": "[PAD]", "extra_special_tokens": ["<mine>", "<other>"]},
            {"additional_special_tokens": ["<other>"], "extra_special_tokens": None},
            {"extra_special_tokens": {"image_token": "<mine>"}},
        ],
    )
    def test_named_tokens_are_added(self, copy, entries):
        edit(copy / "tokenizer_config.json", **entries)
        assert self.agrees(copy).pad_token == entries.get("pad_token", self.pad_of(copy))

    def pad_of(self, folder):
        return json.loads((folder / "tokenizer_config.json").read_text()).get("pad_token")

    def test_numbered_tokens_are_added(self, copy, loaded):
        size = loaded.preprocessor.tokenizer.vocabulary_size()
        options = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
        token = {"content": "<mine>", "special": False, **options}
        entries = json.loads((copy / "tokenizer.json").read_text())["added_tokens"]
        there = {str(entry.pop("id")): entry for entry in entries}
        there |= {str(size): token, str(size + 1): {**token, "content": "<other>", "special": True}}
        edit(copy / "tokenizer_config.json", added_tokens_decoder=there)
        ours = self.agrees(copy)
        assert [ours.token_to_id(x) for x in ("<mine>", "<other>")] == [size, size + 1]

    def test_no_text_is_cut_and_an_id_may_have_no_token(self, copy, loaded):
        size = loaded.preprocessor.tokenizer.vocabulary_size()
        model = json.loads((copy / "tokenizer.json").read_text())["model"]
        last = max(model["vocab"], key=model["vocab"].get)
        gap, model["vocab"][last] = model["vocab"][last], size
        cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        edit(copy / "tokenizer.json", model=model, truncation=cut)
        ours = load_transformers(copy, load_weights=False).preprocessor.tokenizer
        assert ours.vocabulary_size() == size + 1
        assert ours.get_vocabulary()[gap] is None and ours.get_vocabulary()[size] == last
        assert len(ours(TEXTS[0])) > 2

    def test_the_map_of_earlier_versions(self, copy):
        edit(copy / "special_tokens_map.json", pad_token={"content": "[PAD]", "normalized": False})
        assert self.agrees(copy).pad_token == "[PAD]"

    def test_the_end_that_config_json_says(self, copy):
        """As GPT-NeoX's class knows it there."""
        edit(copy / "tokenizer_config.json", eos_token=None)
        edit(copy / "config.json", eos_token_id=[2, 3], pad_token_id=3)
        model = load_transformers(copy, load_weights=False)
        tokenizer = model.preprocessor.tokenizer
        assert tokenizer.end_token_id == 2 and tokenizer.special_token_ids.count(2) == 1
        save_transformers(model, copy / "ours")
        written = json.loads((copy / "ours" / "config.json").read_text())
        assert written["eos_token_id"] == [2, 3]

    @pytest.mark.parametrize(
        ("name", "entries", "reason"),
        [
            ("tokenizer.json", {"model": {"type": "Magic"}}, "files"),
            ("tokenizer_config.json", {"eos_token": None}, "no token"),
            (
                "tokenizer.json",
                {"post_processor": {"type": "BertProcessing", "sep": ["y", 5], "cls": ["x", 4]}},
                "'a'.*'a', 'y'",
            ),
        ],
    )
    def test_what_cannot_be_used_is_left_out_and_the_model_loaded(
        self, copy, name, entries, reason
    ):
        edit(copy / "config.json", eos_token_id=None)
        edit(copy / name, **entries)
        unusable = f"tokenizer.*'{copy}'.*{reason}"
        with pytest.warns(UserWarning, match=unusable):
            assert load_transformers(copy, load_weights=False).preprocessor is None
        with pytest.raises(ValueError, match=unusable):
            require_generation(copy)

    def test_more_ids_than_rows(self, copy):
        edit(copy / "config.json", vocab_size=300)
        message = rf"'{copy}'.*tokenizer.*3\d\d.*300"
        with pytest.raises(ValueError, match=message):
            load_transformers(copy, load_weights=False)
        with pytest.raises(ValueError, match=message):
            require_generation(copy)

    def test_a_sentencepiece_model_alone(self, family, copy):
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer.model").write_bytes(b"")
        with pytest.warns(UserWarning, match="'tokenizer.json'.*`save_pretrained`"):
            assert load_transformers(copy).preprocessor is None


def test_files_of_another_name_are_not_read():
    assert TransformersTokenizer(names=["../secret", "tokenizer.json"]).file_assets == [
        "tokenizer.json"
    ]
