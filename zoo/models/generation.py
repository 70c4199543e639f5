"""How the language models here write texts: token by token, on top of KerasHub's samplers."""

import keras_hub
import numpy as np
from keras import ops

from keras_moe.distribution.active import check_generation
from keras_moe.ops import recorded
from keras_moe.routing.base import positive_integer

SAMPLERS = ("greedy", "beam", "top_k", "top_p", "contrastive", "random")


class Writer:
    """Base of the language models: what writing a text means, whatever the network.

    A subclass has a method `step(token_ids, cache, position)`: the logits
    `[batch, vocabulary_size]` that follow on tokens `[batch, 1]` at a position, the hidden states
    `[batch, hidden_dim]` and the new cache, a tensor or a tuple of tensors and tuples.
    """

    side = ""  # what the names of its texts start with among the inputs

    def compile(self, *args, sampler="greedy", **kwargs):
        """As Keras' own, and `sampler` one of KerasHub's, which `generate` draws tokens with."""
        given, sampler = sampler, keras_hub.samplers.get(sampler)
        if not callable(sampler):
            raise ValueError(
                f"`sampler` must be one of {', '.join(SAMPLERS)}, or a sampler of KerasHub. "
                f"Received: sampler={given!r}"
            )
        if getattr(sampler, "return_all_beams", False):
            raise ValueError(
                "`sampler` must return its best beam alone. Received: return_all_beams=True"
            )
        super().compile(*args, sampler=sampler, **kwargs)
        self._recording = None

    def generate(self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False):
        """As KerasHub's own; `max_length` counts the tokens of the prompt, too.

        Raises:
            ValueError: if there is no text, or `max_length` is no positive integer; if a
                text-to-text model, whose prompts are apart from its texts, is to strip them; on a
                mesh of TensorFlow's devices.
        """
        check_generation()
        has_none = isinstance(inputs, (list, tuple, np.ndarray)) and len(inputs) == 0
        if inputs is None or isinstance(inputs, (int, float)) or has_none:
            raise ValueError(
                "`inputs` must be one or more texts, or tokens as the model takes them. "
                f"Received: inputs={inputs!r}"
            )
        positive_integer("max_length", max_length, optional=True)
        if strip_prompt and self.side:
            raise ValueError(
                "`strip_prompt` must be False for a text-to-text model. Received: strip_prompt=True"
            )
        return super().generate(inputs, max_length, stop_token_ids, strip_prompt)

    def make_generate_function(self):
        function = super().make_generate_function()

        def generate(inputs, stop_token_ids=None):
            inputs, prompt_lengths = _checked(inputs, self.side)
            self._trim(inputs)

            def of_rows(rows):
                part = {name: ops.convert_to_tensor(x[rows]) for name, x in inputs.items()}
                return function(part, stop_token_ids=stop_token_ids)

            if isinstance(self.sampler, keras_hub.samplers.BeamSampler):
                return _by_length(of_rows, prompt_lengths)
            return of_rows(slice(None))

        return generate

    def _trim(self, inputs):
        """Takes needless padding from the inputs, a dictionary of NumPy arrays."""

    def write(self, token_ids, padding_mask, cache, read, stop_token_ids=None):
        """Fills up token ids where the padding mask is 0.

        Args:
            token_ids: `[batch, length]` integers.
            padding_mask: `[batch, length]`, 1 for the tokens of the prompts.
            cache: what `step` takes before any token.
            read: function of the cache that reads the prompts: returns their hidden states
                `[batch, length, hidden_dim]` and the cache after them.
            stop_token_ids: list of integers, after which a text ends; `None`: it ends at `length`.

        Returns:
            Tuple of the token ids and a mask of those that count, `[batch, length]` each.
        """
        given = ops.cast(padding_mask, "bool")
        index = ops.min(ops.sum(ops.cast(given, "int32"), axis=-1))
        if isinstance(self.sampler, keras_hub.samplers.ContrastiveSampler):
            hidden_states, cache = read(cache)  # which it compares new ones with
        else:  # the first step reads the last token of a prompt, and most have but one
            hidden_states = None
            cache = ops.cond(index > 1, lambda: read(cache)[1], lambda: cache)
        step = self.step if self.run_eagerly else self._recorded_step()

        def next(prompt, cache, index):
            position = ops.cast(index - 1, "int32")
            last = ops.slice(prompt, (0, position), (ops.shape(prompt)[0], 1))
            logits, hidden, cache = step(last, cache, position)
            return self._only_pieces(logits), hidden, cache

        token_ids = self.sampler(
            next=next,
            prompt=token_ids,
            cache=cache,
            index=index,
            mask=given,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        return token_ids, _written(token_ids, given, stop_token_ids)

    def _recorded_step(self):
        """`step`, recorded for the variables that the model has now, until it is compiled anew."""
        variables = self.variables
        if self._recording is None or not self._recording.is_of(variables):
            self._recording = _Recording(self.step, variables)
        return self._recording.step

    def _only_pieces(self, logits):
        """Logits in which rows of the table beyond the tokenizer's pieces have no chance."""
        if self.preprocessor is None:
            return logits
        pieces = self.preprocessor.tokenizer.vocabulary_size()
        if pieces >= logits.shape[-1]:
            return logits
        return ops.where(ops.arange(logits.shape[-1], dtype="int32") < pieces, logits, -1e9)


def _checked(inputs, side):
    """Inputs of `generate` as NumPy arrays, and the lengths of the prompts."""
    inputs = {name: ops.convert_to_numpy(value) for name, value in inputs.items()}
    mask = inputs[f"{side}padding_mask"].astype(bool)
    lengths = mask.sum(axis=1)
    if not (lengths > 0).all() or (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise ValueError(
            f"`{side}padding_mask` must be 1 for one token or more and 0 for all after them, in "
            f"every row. Received: {mask.astype(int).tolist()}"
        )
    return inputs, lengths


class _Recording:
    """A recorded step and its variables, which Keras must not take for more of the model's."""

    def __init__(self, step, variables):
        self.step = recorded(step)
        self.variables = variables

    def is_of(self, variables):
        return len(self.variables) == len(variables) and all(
            one is other for one, other in zip(self.variables, variables, strict=True)
        )


def _by_length(function, lengths):
    """What a function of rows returns, called for the rows of one length at a time.

    Where one text goes on while another's prompt does not end, the beams of the other would all
    become the same.
    """
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    outputs = [function(rows) for rows in groups]
    order = np.argsort(np.concatenate(groups))
    return {
        name: np.concatenate([ops.convert_to_numpy(of_group[name]) for of_group in outputs])[order]
        for name in outputs[0]
    }


def _written(token_ids, given, stop_token_ids):
    """Which tokens count: all but what stands after the first stop token that was generated."""
    if stop_token_ids is None:
        return ops.ones_like(given)
    stop_token_ids = ops.cast(ops.convert_to_tensor(stop_token_ids), token_ids.dtype)
    is_stop = ops.any(token_ids[..., None] == stop_token_ids, axis=-1)
    stops = ops.cast(is_stop & ~given, "int32")
    return ops.cumsum(stops, axis=-1) - stops == 0
