"""The tokenizer of the zoo's own models: 8,000 case-folded SentencePiece pieces.

How the shipped vocabulary was made is told in `assets/README.md`.
"""

import importlib.resources

import keras
import keras_hub

VOCABULARY = "wiki_news_novels_8k.spm"


@keras.saving.register_keras_serializable(package="zoo")
class ZooTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """SentencePiece with T5's special pieces: `<pad>` 0, `</s>` 1 and `<unk>` 2.

    As in T5 the decoder starts with the piece that ends a text, here `</s>`.

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
        except (OSError, ValueError):
            raise
        except Exception as error:  # TensorFlow Text and SentencePiece each have their own
            received = f"{len(proto)} bytes" if isinstance(proto, bytes) else proto
            raise ValueError(
                f"`proto` must be a SentencePiece model. Received: {received}"
            ) from error


def default_tokenizer(**kwargs):
    """The `ZooTokenizer` with the shipped vocabulary.

    Args:
        **kwargs: arguments of `ZooTokenizer` other than `proto`.
    """
    asset = importlib.resources.files("zoo").joinpath("assets", VOCABULARY)
    return ZooTokenizer(proto=asset.read_bytes(), **kwargs)
