"""The tokenizers of Mixtral and OLMoE: what a checkpoint's `tokenizer.json` says, and all of it.

KerasHub's own byte-pair and SentencePiece tokenizers know neither its normalizers nor its added
tokens, and split words in other ways; the package that wrote the file, `tokenizers`, reads it here,
as in transformers. KerasHub needs that package, too.
"""

import itertools
import json
from pathlib import Path

import keras
import keras_hub
import numpy as np
import tokenizers
from keras import ops

from zoo.conversion.config import integer

VOCABULARY, SETTINGS, LEGACY = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
FILES = (VOCABULARY, SETTINGS, LEGACY, "tokenizer.model", "chat_template.jinja")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class UnusableError(ValueError):
    """A tokenizer that is there would not give the ids that it gives in transformers."""


@keras.saving.register_keras_serializable(package="zoo")
class TransformersTokenizer(keras_hub.tokenizers.Tokenizer):
    """The tokenizer of a folder that transformers wrote, see `load_tokenizer`.

    Its ids are those of transformers' own. A special token in a text is one, as there, and none is
    added around it: a `zoo.CausalLMPreprocessor` does that. TensorFlow takes part in `tf.data`
    pipelines only, which call back to Python.

    Args:
        files: name -> content, as bytes, of the folder's files; `None` if they come later.
        start_token: the token that starts a text; `None` if none does.
        end_token: the token that ends one.
        pad_token: the token that fills up; `None`: that of id 0.
        names: names of the files that come later.
    """

    def __init__(
        self, files=None, start_token=None, end_token=None, pad_token=None, names=(), **kwargs
    ):
        super().__init__(**{"dtype": "int32", **kwargs})
        self.tokens = {"start_token": start_token, "end_token": end_token, "pad_token": pad_token}
        self.file_assets = [name for name in FILES if name in names]
        self.files = self._tokenizer = None
        for name, token in self.tokens.items():
            setattr(self, name, token)
            setattr(self, f"{name}_id", None)
        if files is not None:
            self.set_files(files)

    def set_files(self, files):
        self.files = dict(files)
        self.file_assets = [name for name in FILES if name in files]
        self._tokenizer = _pipeline(files)
        self._size = max(self._tokenizer.get_vocab().values()) + 1
        self._special_token_attrs = []
        for name, token in self.tokens.items():
            if token is not None:
                self._add_special_token(token, name)

    def save_assets(self, dir_path):
        for name, content in self.files.items():
            (Path(dir_path) / name).write_bytes(content)

    def load_assets(self, dir_path):
        self.set_files({name: (Path(dir_path) / name).read_bytes() for name in self.file_assets})

    def vocabulary_size(self):
        """One more than the largest id."""
        if self._tokenizer is None:
            raise ValueError("The tokenizer must have its files. Received: files=None")
        return self._size

    def get_vocabulary(self):
        """The tokens by id; `None` where an id has none."""
        return [self._tokenizer.id_to_token(id) for id in range(self.vocabulary_size())]

    def id_to_token(self, id):
        return self._tokenizer.id_to_token(id)

    def token_to_id(self, token):
        return self._tokenizer.token_to_id(token)

    def tokenize(self, inputs):
        if self._use_tf_workflow():
            return self._tokenize_in_graph(inputs)
        texts = _texts(inputs)
        if isinstance(texts, str):
            return np.array(self._ids([texts])[0], "int32")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`inputs` must be a text or a list of texts. Received: {inputs!r}")
        return self._ids(texts)

    def _ids(self, texts):
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _tokenize_in_graph(self, inputs):
        import tensorflow as tf

        def flat(texts):
            rows = self._ids(_texts(texts))
            ids, lengths = [*itertools.chain(*rows)], [len(row) for row in rows]
            return np.array(ids, "int32"), np.array(lengths, "int64")

        inputs = tf.convert_to_tensor(inputs)
        ids, lengths = tf.numpy_function(flat, [tf.reshape(inputs, [-1])], ("int32", "int64"))
        ids, lengths = (tf.ensure_shape(x, [None]) for x in (ids, lengths))
        is_one = inputs.shape.rank == 0
        return ids if is_one else tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False)

    def detokenize(self, inputs):
        """Texts of ids, special tokens included; not in TensorFlow's graphs."""
        rows = _lists(inputs)
        is_one = not rows or not isinstance(rows[0], list)
        texts = self._tokenizer.decode_batch([rows] if is_one else rows, skip_special_tokens=False)
        return texts[0] if is_one else texts

    def call(self, inputs, *args, training=None, **kwargs):
        return self.tokenize(inputs)

    def get_config(self):
        return {**super().get_config(), **self.tokens, "names": self.file_assets}


def _texts(inputs):
    """Texts, tensors of texts and what is made of them, as strings in lists."""
    if hasattr(inputs, "numpy"):
        inputs = inputs.numpy()
    if hasattr(inputs, "tolist"):
        inputs = inputs.tolist()
    if isinstance(inputs, (list, tuple)):
        return [_texts(x) for x in inputs]
    return inputs.decode() if isinstance(inputs, bytes) else inputs


def _lists(ids):
    """Ids in tensors, arrays and lists of them, as integers in lists."""
    if hasattr(ids, "to_list"):  # ragged
        return ids.to_list()
    if isinstance(ids, (list, tuple)):
        return [_lists(x) for x in ids]
    return ops.convert_to_numpy(ids).tolist() if hasattr(ids, "shape") else ids


def load_tokenizer(folder, config):
    """The tokenizer of a folder that transformers wrote.

    Args:
        folder: a `Path`.
        config: its `config.json`, which tells of the end and the padding where the tokenizer's
            files do not.

    Returns:
        A `TransformersTokenizer`; `None` if the folder has no files of one.

    Raises:
        UnusableError: if there is a tokenizer that would not give the ids that it gives there.
        ValueError: if it has more ids than the model has rows.
    """

    def unusable(reason):
        return UnusableError(f"The tokenizer of {str(folder)!r} cannot be used: {reason}")

    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if VOCABULARY not in files:
        if "tokenizer.model" not in files:
            return None
        raise unusable(
            f"it is a 'tokenizer.model' without a {VOCABULARY!r}, which the `save_pretrained` of "
            "transformers' `LlamaTokenizer` writes"
        )
    try:
        pipeline, settings = _pipeline(files), _settings(files)
    except Exception as error:  # the package's own are no more than that
        raise unusable(f"its files cannot be read ({error})") from error
    ids, rows = pipeline.get_vocab().values(), integer(config, "vocab_size")
    if max(ids, default=0) >= rows:
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit: its tokenizer has ids up to {max(ids)}, "
            f"and the model has {rows} rows"
        )

    def token(name):
        if settings.get(name) is not None:
            return settings[name]
        ids = config.get(f"{name}_id")
        id = next(iter(ids), None) if isinstance(ids, list) else ids
        return pipeline.id_to_token(id) if isinstance(id, int) and id >= 0 else None

    end, plain = token("eos_token"), pipeline.encode("a", add_special_tokens=False).tokens
    if end is None:
        raise unusable("it names no token that ends a text")
    whole = pipeline.encode("a").tokens
    extra = len(whole) - len(plain)
    before = next((i for i in range(extra + 1) if whole[i:][: len(plain)] == plain), 0)
    if before > 1 or whole[before:] not in (plain, [*plain, end]):
        raise unusable(f"it turns the text 'a' into {whole}, more than a start and an end")
    start = whole[0] if before else None
    return TransformersTokenizer(files, start, end, token("pad_token"))


def _settings(files):
    """The named tokens, and a list of all that are to be added, as `AddedToken`s, under `added`."""
    entries = json.loads(files.get(SETTINGS, b"{}"))
    if "added_tokens_decoder" not in entries:
        entries |= json.loads(files.get(LEGACY, b"{}"))
    added = sorted(entries.get("added_tokens_decoder", {}).items(), key=lambda pair: int(pair[0]))
    others = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or ()
    others = others.values() if isinstance(others, dict) else others
    named = {name: _content(entries[name]) for name in NAMED if name in entries}
    special = [token for token in (*named.values(), *map(_content, others)) if token is not None]
    return {
        **named,
        "added": [_added(**entry) for _, entry in added],
        "special": [_added(token, special=True) for token in special],
    }


def _content(token):
    return token["content"] if isinstance(token, dict) else token


def _added(content, special=False, normalized=None, lstrip=False, rstrip=False, single_word=False):
    return tokenizers.AddedToken(
        content,
        special=special,
        normalized=not special if normalized is None else normalized,
        lstrip=lstrip,
        rstrip=rstrip,
        single_word=single_word,
    )


def _pipeline(files):
    """What `tokenizers` makes of the files, with the tokens that transformers would add."""
    pipeline = tokenizers.Tokenizer.from_str(files[VOCABULARY].decode())
    pipeline.no_padding()
    pipeline.no_truncation()
    settings = _settings(files)
    pipeline.add_tokens(settings["added"])
    there = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    pipeline.add_tokens([token for token in settings["special"] if token.content not in there])
    return pipeline
