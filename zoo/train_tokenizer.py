"""Trains the SentencePiece model that `zoo.tokenizer` ships.

    python -m zoo.train_tokenizer corpus/*-train-*.jsonl.gz --output tokenizer.spm

Each input is a gzip file with one JSON object per line, `{"title": ..., "text": ...}`. Files whose
names agree up to the first `-` are one corpus, and every corpus gives the same number of sentences,
so that a large one does not crowd out a small one.
"""

import argparse
import gzip
import io
import os
import pathlib
import random
import re
import string
import sys
import zlib

import sentencepiece

from zoo.files import parse_json

# The ids of T5 (https://arxiv.org/abs/1910.10683); there is no start-of-text piece.
SPECIAL_PIECES = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}

# Never unknown, however rare: coverage alone would leave out `#`, `=` and `*`, which tasks use.
REQUIRED_CHARACTERS = string.punctuation + "\u2018\u2019\u201c\u201d£€°"


def read_sentences(path):
    """Yields the sentences of one `.jsonl.gz` file.

    Raises:
        ValueError: if the file cannot be read, is not of that form, or is kept for evaluation.
    """
    if "heldout" in pathlib.Path(path).name:
        raise ValueError(f"Held-out files are for evaluation only. Received: {path}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                sentences = re.split(r"(?<=[.!?])\s+|\n+", parse_json(line)["text"])
                yield from filter(None, map(str.strip, sentences))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            'Expected gzip with one {"title": ..., "text": ...} per line. '
            f"Received: {path} ({error})"
        ) from error


def sample_sentences(paths, num_sentences, seed=0):
    """An equal share of `num_sentences` from each corpus, or all that it has.

    Raises:
        ValueError: if a corpus has no sentence.
    """
    corpora = {}
    for path in sorted(paths, key=lambda path: pathlib.Path(path).name):
        name = pathlib.Path(path).name.split("-")[0]
        corpora.setdefault(name, []).append(path)
    rng = random.Random(seed)
    sample = []
    for name, files in corpora.items():
        sentences = [sentence for path in files for sentence in read_sentences(path)]
        if not sentences:
            raise ValueError(f"The files of corpus {name} hold no text. Received: {files}")
        sample += rng.sample(sentences, min(len(sentences), num_sentences // len(corpora)))
    return sample


def train(sentences, num_pieces):
    """Trains a case-folding unigram model on an iterable of strings.

    Args:
        sentences: iterable of strings.
        num_pieces: integer, the size of the vocabulary, special pieces included.

    Returns:
        The model as bytes, a function of the arguments alone.

    Raises:
        ValueError: if so many pieces cannot be found in the sentences.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=num_pieces,
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=0.9999,
            required_chars=REQUIRED_CHARACTERS,
            byte_fallback=False,
            split_digits=True,
            num_threads=16,  # sets the order of summation, and so the model, whatever the machine
            minloglevel=2,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            **SPECIAL_PIECES,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(
            f"SentencePiece found no model. Received: num_pieces={num_pieces} ({reason})"
        ) from error
    return model.getvalue()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m zoo.train_tokenizer", description="Trains a SentencePiece tokenizer."
    )
    parser.add_argument("files", nargs="+", help=".jsonl.gz files")
    parser.add_argument("--output", required=True, help="the .spm file to write")
    parser.add_argument("--pieces", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--sentences", type=int, default=500_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: %(default)s")
    options = parser.parse_args(arguments)

    try:
        sentences = sample_sentences(options.files, options.sentences, options.seed)
        model = train(sentences, options.pieces)
    except ValueError as error:
        sys.exit(f"error: {error}")
    beside = f"{options.output}.part"
    pathlib.Path(beside).write_bytes(model)
    os.replace(beside, options.output)
    print(f"{options.output}: {len(model):,} bytes from {len(sentences):,} sentences")


if __name__ == "__main__":
    main()
