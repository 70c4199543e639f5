"""What all language models here share while they generate."""

from keras import ops


def written(token_ids, given, stop_token_ids):
    """Which tokens count: all but what stands after the first stop token that was generated.

    Args:
        token_ids: `[batch, length]` integers.
        given: `[batch, length]` booleans, `True` for tokens of the prompt.
        stop_token_ids: list of integers; `None`: all tokens count.

    Returns:
        `[batch, length]` booleans.
    """
    if stop_token_ids is None:
        return ops.ones_like(given)
    stop_token_ids = ops.cast(ops.convert_to_tensor(stop_token_ids), token_ids.dtype)
    is_stop = ops.any(token_ids[..., None] == stop_token_ids, axis=-1)
    stops = ops.cast(is_stop & ~given, "int32")
    return ops.cumsum(stops, axis=-1) - stops == 0


def only_pieces(logits, model):
    """Logits in which rows of the table beyond the tokenizer's pieces, if any, have no chance.

    Args:
        logits: `[batch, vocabulary_size]` tensor.
        model: a task; without a preprocessor all rows are pieces.
    """
    if model.preprocessor is None:
        return logits
    pieces = model.preprocessor.tokenizer.vocabulary_size()
    if pieces >= logits.shape[-1]:
        return logits
    return ops.where(ops.arange(logits.shape[-1], dtype="int32") < pieces, logits, -1e9)
