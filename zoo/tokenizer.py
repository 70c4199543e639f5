"""The tokenizer of the zoo's own models: 8,000 case-folded SentencePiece pieces.

How the shipped vocabulary was made is told in `assets/README.md`.
"""

import importlib.resources
import re
from numbers import Integral
from pathlib import Path

import keras
import keras_hub
import numpy as np

from keras_moe.routing.base import not_negative

VOCABULARY = "wiki_news_novels_8k.spm"
SPECS = {2, 3}  # the fields of the trainer's and the normalizer's settings, after all pieces
SENTINEL = "▁<extra_id_{}>"  # with the space before it
SENTINELS = re.compile(SENTINEL.format(r"(\d+)"))


@keras.saving.register_keras_serializable(package="zoo")
class ZooTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """SentencePiece with T5's special pieces: `<pad>` 0, `</s>` 1 and `<unk>` 2.

    As in T5 the decoder starts with the piece that ends a text, here `</s>`. Where the model has
    sentinels, see `t5_tokenizer`, they are found wherever they stand in a text.

    Example:

    ```python
    tokenizer = zoo.default_tokenizer()
    tokenizer(["The quick brown fox", "jumped."])
    tokenizer.detokenize(tokenizer("The quick brown fox"))  # "the quick brown fox"
    ```

    Args:
        proto: path of a SentencePiece model, or the model as bytes.

    Raises:
        ValueError: if `proto` is no SentencePiece model, or one without the special pieces.
    """

    def __init__(self, proto=None, **kwargs):
        self._add_special_token("</s>", "end_token")
        self._add_special_token("</s>", "start_token")
        self._add_special_token("<pad>", "pad_token")
        super().__init__(proto=proto, **kwargs)

    def set_proto(self, proto):
        try:
            super().set_proto(proto)
        except UnicodeDecodeError as error:  # of a piece
            received = f"{len(proto)} bytes" if isinstance(proto, bytes) else proto
            raise ValueError(
                "`proto` must be a SentencePiece model of pieces in UTF-8. "
                f"Received: {received}, where {error}"
            ) from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # TensorFlow Text and SentencePiece each have their own
            received = f"{len(proto)} bytes" if isinstance(proto, bytes) else proto
            raise ValueError(
                f"`proto` must be a SentencePiece model. Received: {received}"
            ) from error
        if self.proto is not None and not _fields(self.proto) >= SPECS:
            raise ValueError(
                "`proto` must be a whole SentencePiece model, with the settings that follow its "
                f"pieces. Received: {len(self.proto)} bytes"
            )
        matches = [SENTINELS.fullmatch(piece) for piece in self._vocabulary or ()]
        numbers = "|".join(match[1] for match in matches if match)
        self._sentinels = f"<extra_id_(?:{numbers})>" if numbers else None

    def tokenize(self, inputs):
        if self._sentinels is not None:
            inputs = self._set_apart(inputs)
        return super().tokenize(inputs)

    def _set_apart(self, inputs):
        """Texts with a space, which belongs to the piece, before every sentinel, and one after."""
        if self._use_tf_workflow():
            import tensorflow as tf

            return tf.strings.regex_replace(inputs, self._sentinels, r" \0 ")
        if isinstance(inputs, bytes):
            inputs = inputs.decode("utf-8")
        if isinstance(inputs, str):
            return re.sub(self._sentinels, r" \g<0> ", inputs)
        if hasattr(inputs, "shape"):
            inputs = np.asarray(inputs).tolist()
            return self._set_apart(inputs) if isinstance(inputs, (str, bytes, list)) else inputs
        return [self._set_apart(x) for x in inputs] if isinstance(inputs, (list, tuple)) else inputs


def default_tokenizer(**kwargs):
    """The `ZooTokenizer` with the shipped vocabulary.

    Args:
        **kwargs: arguments of `ZooTokenizer` other than `proto`.
    """
    asset = importlib.resources.files("zoo").joinpath("assets", VOCABULARY)
    return ZooTokenizer(proto=asset.read_bytes(), **kwargs)


def t5_tokenizer(proto, sentinels=100, **kwargs):
    """The tokenizer of T5 and of the public Switch models, from their `spiece.model`.

    The file lacks the sentinels that mark what is missing from a text, `<extra_id_0>` to
    `<extra_id_99>`: they are added after its pieces, the first one last, as transformers does.
    A text that comes back has a space before each of them.

    Example:

    ```python
    tokenizer = zoo.t5_tokenizer("spiece.model")
    tokenizer("A <extra_id_0> walks into a bar <extra_id_1> parrot.")
    ```

    Args:
        proto: path of the SentencePiece model, or the model as bytes.
        sentinels: how many to add; none are added to a model that has some.
        **kwargs: other arguments of `ZooTokenizer`.

    Returns:
        A `ZooTokenizer`.

    Raises:
        ValueError: if `sentinels` is negative, or `proto` is no SentencePiece model.
    """
    not_negative("sentinels", sentinels, Integral)
    if not isinstance(proto, bytes):
        proto = Path(proto).read_bytes()
    tokenizer = ZooTokenizer(proto=proto, **kwargs)
    if sentinels == 0 or SENTINEL.format(0) in tokenizer.get_vocabulary():
        return tokenizer
    # A serialized message goes on with further entries of its repeated fields.
    pieces = [_piece(SENTINEL.format(number)) for number in reversed(range(sentinels))]
    return ZooTokenizer(proto=proto + b"".join(pieces), **kwargs)


def without_sentinels(proto):
    """The SentencePiece model, as bytes, that `t5_tokenizer` was given."""
    number = 0
    while proto.endswith(piece := _piece(SENTINEL.format(number))):
        proto, number = proto.removesuffix(piece), number + 1
    return proto


def _fields(proto):
    """Numbers of the fields of a serialized protobuf message."""
    place, numbers = 0, set()
    while place < len(proto):
        key, place = _varint(proto, place)
        numbers.add(key >> 3)
        kind = key & 7
        if kind in (0, 2):
            size, place = _varint(proto, place)
            place += size if kind == 2 else 0
        else:
            place += 8 if kind == 1 else 4
    return numbers


def _varint(proto, place):
    """An integer of 7 bits per byte, the lowest first, and the place behind."""
    value, shift = 0, 0
    while proto[place] >= 128:
        value |= (proto[place] & 127) << shift
        place, shift = place + 1, shift + 7
    return value | proto[place] << shift, place + 1


def _piece(text):
    """An entry of a SentencePiece model: field 1 with text, score 0 and type USER_DEFINED."""
    text = text.encode()
    piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4) + b"\x18\x04"
    return b"\x0a" + bytes([len(piece)]) + piece
