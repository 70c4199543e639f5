import gzip
import io
import json

import keras
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
import transformers

from zoo.tokenizer import ZooTokenizer, default_tokenizer, t5_tokenizer, without_sentinels
from zoo.train_tokenizer import REQUIRED_CHARACTERS, main, sample_sentences, train


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


@pytest.fixture
def corpus(tmp_path):
    """Two corpora: `plain` with 40 sentences in two files, `rare` with 4 in one."""

    def write(name, texts):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"title": "", "text": text}) + "\n" for text in texts)

    write("plain-train-00.jsonl.gz", [f"The cat number 19{i} sat. It slept!" for i in range(10)])
    write("plain-train-01.jsonl.gz", [f"A dog named {i} ran.\n\nWhere to?" for i in range(10)])
    write("rare-train-00.jsonl.gz", ["Quiet zebras jump over. Foxes vex me. Why? Because."])
    return sorted(tmp_path.glob("*.gz"))


def ids(tokenizer, text):
    return keras.ops.convert_to_numpy(tokenizer(text)).tolist()


# The shipped vocabulary.


def test_vocabulary_and_special_pieces(tokenizer):
    assert tokenizer.vocabulary_size() == 8000
    assert tokenizer.get_vocabulary()[:3] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.end_token_id == tokenizer.start_token_id == 1
    assert tokenizer.token_to_id("no such piece") == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The quick brown Fox.", "the quick brown fox."),
        ("It's 1984; don't  “WORRY” — Café…", "it's 1984; don't “worry” — café..."),
        ("a & b = #7 <c> {d}", "a & b = #7 <c> {d}"),
        ("", ""),
    ],
)
def test_a_text_comes_back_case_folded(tokenizer, text, expected):
    assert tokenizer.detokenize(ids(tokenizer, text)) == expected


def test_digits_are_split_and_no_required_character_is_unknown(tokenizer):
    pieces = [tokenizer.id_to_token(id) for id in ids(tokenizer, "1984")]
    assert pieces == ["▁", "1", "9", "8", "4"]
    assert 2 not in ids(tokenizer, REQUIRED_CHARACTERS)
    assert 2 in ids(tokenizer, "漢")


def test_batches_and_padding():
    tokenizer = default_tokenizer(sequence_length=6, add_eos=True)
    short, long = keras.ops.convert_to_numpy(tokenizer(["the", "one two three four five six"]))
    assert short.tolist()[1:] == [1, 0, 0, 0, 0]
    assert len(long) == 6 and 0 not in long


def test_config_and_vocabulary_round_trip(tokenizer, tmp_path):
    tokenizer.save_assets(tmp_path)
    for copy in (
        ZooTokenizer.from_config(tokenizer.get_config()),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tokenizer)),
    ):
        assert isinstance(copy, ZooTokenizer)
        copy.load_assets(tmp_path)
        assert copy.end_token_id == 1
        assert ids(copy, "A round trip.") == ids(tokenizer, "A round trip.")


# Wrong files.


@pytest.mark.parametrize("proto", [b"", b"no model"])
def test_not_a_model(proto):
    with pytest.raises(ValueError, match=f"`proto`.* {len(proto)} bytes"):
        ZooTokenizer(proto=proto)


def test_not_a_model_file(tmp_path):
    path = tmp_path / "notes.spm"
    path.write_text("no model")
    with pytest.raises(ValueError, match=f"`proto`.*{path}"):
        ZooTokenizer(proto=str(path))
    with pytest.raises(FileNotFoundError, match="missing.spm"):
        ZooTokenizer(proto=str(tmp_path / "missing.spm"))


def test_a_model_without_the_special_pieces():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 10), model_writer=model, vocab_size=8, minloglevel=2
    )
    with pytest.raises(ValueError, match="'<pad>'"):
        ZooTokenizer(proto=model.getvalue())


# Training.


def test_every_corpus_gives_its_share(corpus):
    sample = sample_sentences(corpus, num_sentences=8)
    rare = {"Quiet zebras jump over.", "Foxes vex me.", "Why?", "Because."}
    assert len(sample) == 8
    assert rare < set(sample)  # all four, and four of the other forty
    assert sample_sentences(corpus, 8, seed=0) == sample != sample_sentences(corpus, 8, seed=1)


def test_training_is_deterministic(corpus, tmp_path):
    files = [str(path) for path in corpus]
    first, second = tmp_path / "first.spm", tmp_path / "second.spm"
    for output, order in ((first, files), (second, files[::-1])):
        main([*order, "--output", str(output), "--pieces", "90"])
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_trained_vocabulary_is_like_the_shipped_one(corpus):
    tokenizer = ZooTokenizer(proto=train(sample_sentences(corpus, 100), 90))
    assert tokenizer.vocabulary_size() == 90
    assert tokenizer.get_vocabulary()[:3] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.detokenize(ids(tokenizer, "The zebra & 19 CATS.")) == "the zebra & 19 cats."
    assert not [piece for piece in tokenizer.get_vocabulary() if "19" in piece]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"not gzip",
        gzip.compress(b'{"text": "Cut off."}', mtime=0)[:-12],
        gzip.compress(b"not JSON\n", mtime=0),
        gzip.compress(b'{"title": "No text"}\n', mtime=0),
        gzip.compress(b'{"text": 7}\n', mtime=0),
        gzip.compress(b"[]\n", mtime=0),
    ],
)
def test_odd_file(tmp_path, content):
    path = tmp_path / "plain-train-00.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f'"text".*{path}'):
        sample_sentences([path], 10)


def test_empty_and_held_out_files(tmp_path):
    empty = tmp_path / "plain-train-00.jsonl.gz"
    empty.write_bytes(gzip.compress(b"", mtime=0))
    with pytest.raises(ValueError, match=f"corpus plain .*{empty.name}"):
        sample_sentences([empty], 10)
    with pytest.raises(ValueError, match="Held-out.*plain-heldout-00"):
        sample_sentences([tmp_path / "plain-heldout-00.jsonl.gz"], 10)


def test_too_many_pieces():
    with pytest.raises(ValueError, match=r"num_pieces=8000.*<= \d"):
        train(["Few words."], 8000)


def test_the_command_reports_in_one_sentence(tmp_path):
    missing = str(tmp_path / "missing.jsonl.gz")
    with pytest.raises(SystemExit, match=f"error: .*{missing}"):
        main([missing, "--output", str(tmp_path / "out.spm")])
    assert not list(tmp_path.iterdir())


# T5's vocabularies, which lack the sentinels.


def test_sentinels_are_the_last_pieces_and_the_first_is_last(tokenizer):
    t5 = t5_tokenizer(tokenizer.proto)
    assert t5.vocabulary_size() == 8100
    words = ids(tokenizer, "a"), ids(tokenizer, "walks"), ids(tokenizer, "bar")
    text = "A <extra_id_0> walks <extra_id_99> bar"
    assert ids(t5, text) == [*words[0], 8099, *words[1], 8000, *words[2]]
    assert t5.detokenize(ids(t5, text)) == text.lower()
    assert ids(t5, "<extra_id_1> bar") == [8098, *words[2]]
    assert ids(t5, "the quick brown fox") == ids(tokenizer, "the quick brown fox")


def test_sentinels_are_added_once_and_as_many_as_asked(tokenizer, tmp_path):
    (tmp_path / "spiece.model").write_bytes(tokenizer.proto)
    three = t5_tokenizer(tmp_path / "spiece.model", sentinels=3)
    assert three.get_vocabulary()[8000:] == [f"▁<extra_id_{n}>" for n in (2, 1, 0)]
    assert t5_tokenizer(three.proto).vocabulary_size() == 8003
    assert t5_tokenizer(tokenizer.proto, sentinels=0).vocabulary_size() == 8000


@pytest.mark.parametrize("sentinels", [-1, 2.5])
def test_sentinels_are_a_number(tokenizer, sentinels):
    with pytest.raises(ValueError, match=f"`sentinels`.*sentinels={sentinels}"):
        t5_tokenizer(tokenizer.proto, sentinels=sentinels)


def test_sentinels_are_taken_off_again(tokenizer):
    for sentinels in (0, 3, 100):
        proto = t5_tokenizer(tokenizer.proto, sentinels=sentinels).proto
        assert without_sentinels(proto) == tokenizer.proto


def test_sentinels_are_saved(tokenizer, tmp_path):
    t5 = t5_tokenizer(tokenizer.proto)
    t5.save_assets(tmp_path)
    again = ZooTokenizer.from_config(t5.get_config())
    again.load_assets(tmp_path)
    assert ids(again, "a <extra_id_7>") == ids(t5, "a <extra_id_7>")


TEXTS = [
    "a <extra_id_0> cat",
    "(<extra_id_0>)",
    "a<extra_id_0>",
    "<extra_id_0><extra_id_1>",
    " <extra_id_0>  a<extra_id_99>dog ",
    "<extra_id_0>",
    "the <extra_id_100> cat <extra_id_07>",
    "the quick cat",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A small vocabulary in transformers' tokenizer and in ours."""
    folder = tmp_path_factory.mktemp("tokenizer")
    proto = train(["The cat sat (it slept)!", "A dog named Rex ran to a bar."] * 20, 60)
    (folder / "spiece.model").write_bytes(proto)
    return transformers.T5Tokenizer.from_pretrained(folder), t5_tokenizer(proto)


@pytest.mark.parametrize("text", TEXTS)
def test_sentinels_are_found_where_transformers_finds_them(both, text):
    theirs, ours = both
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    for received in (text, text.encode(), np.array(text), tf.constant(text)):
        assert ids(ours, received) == expected
    for received in ([text], (text,), np.array([text])):
        assert [list(row) for row in ours(received)] == [expected]
    # The spaces before sentinels are not theirs, nor is the mark of an unknown piece.
    back = ours.detokenize(expected).replace("⁇", "<unk>").replace(" ", "")
    assert back == theirs.decode(expected).replace(" ", "")


def test_sentinels_are_found_in_tensorflows_pipelines(both):
    theirs, ours = both
    rows = tf.data.Dataset.from_tensor_slices(TEXTS).map(ours).as_numpy_iterator()
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [row.tolist() for row in rows] == expected
    batches = tf.data.Dataset.from_tensor_slices(TEXTS).batch(8).map(ours)
    assert [batch.to_list() for batch in batches] == [expected]


def test_what_is_no_text(both):
    with pytest.raises(ValueError, match=r"string.*Received: \[1, 2\]"):
        both[1]([1, 2])
    with pytest.raises(ValueError, match="string.*Received: 3"):
        both[1](3)


def test_a_model_cut_short_between_pieces_is_refused():
    """It could be read: a serialized message may end after any of its entries."""
    proto, end = default_tokenizer().proto, 0
    for _ in range(100):  # entries of the field of pieces: key, length, piece
        assert proto[end] == 0x0A
        end += 2 + proto[end + 1]
    assert sentencepiece.SentencePieceProcessor(model_proto=proto[:end]).vocab_size() == 100
    with pytest.raises(ValueError, match=f"`proto`.*whole.*{end} bytes"):
        ZooTokenizer(proto[:end])


def test_a_piece_that_is_no_text_is_refused():
    proto = bytearray(default_tokenizer().proto)
    proto[proto.index("▁".encode(), 40)] ^= 0x40
    with pytest.raises(ValueError, match="`proto`.*UTF-8.*bytes") as error:
        ZooTokenizer(bytes(proto))
    assert not isinstance(error.value, UnicodeDecodeError)
