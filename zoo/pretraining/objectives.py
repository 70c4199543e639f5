"""What a model learns from blocks of text, each a function of token ids to a batch.

B rows, L tokens of a block, N tokens that are noise, P spans of noise, M tokens to guess.

Every batch has the same shapes. A sentinel stands for what is missing; the first one is the last
id of the tokenizer, the next the one before it, as in T5 (`zoo.t5_tokenizer`).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Span:
    """Span corruption: the decoder says what is missing from the encoder's text.

    Raffel et al. 2020 (https://arxiv.org/abs/1910.10683), section 3.1.4: a share of the tokens, in
    spans, is replaced by one sentinel for each span; the decoder says each sentinel and what it
    stands for. As T5 draws them, a block begins with tokens that stay and ends with noise.

    Args:
        length: tokens of a block.
        sentinel: id of the first sentinel.
        end: id of the token that ends a text.
        density: share of the tokens that are noise.
        mean_span: tokens of a span, in the mean.
    """

    length: int
    sentinel: int
    end: int
    density: float = 0.15
    mean_span: float = 3.0

    architecture = "encoder_decoder"

    @property
    def block(self):
        return self.length

    @property
    def _noise(self):
        """Tokens that are noise, and spans of them; at least one token of either kind stays."""
        tokens = int(np.clip(round(self.length * self.density), 1, self.length - 1))
        spans = int(np.clip(round(tokens / self.mean_span), 1, min(tokens, self.length - tokens)))
        return tokens, spans

    def __call__(self, tokens_BL, rng):
        noise, spans = self._noise
        rows = len(tokens_BL)
        kept_BP = _parts(rng, rows, self.length - noise, spans)
        lost_BP = _parts(rng, rows, noise, spans)
        lengths = np.stack([kept_BP, lost_BP], axis=-1).reshape(rows, -1)  # in turn
        is_noise_BL = _spelled(lengths) % 2 == 1
        sentinels_BL = self.sentinel - (_spelled(lengths) // 2)
        encoder = _replaced(tokens_BL, is_noise_BL, sentinels_BL, self.end)
        # The other way round what is kept is the noise; its first span is what begins a block.
        decoder = _replaced(tokens_BL, ~is_noise_BL, sentinels_BL, self.end)
        return _seq2seq(encoder, decoder)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prefix language model: the decoder goes on where the encoder's text ends.

    Raffel et al. 2020, section 3.2.1. The place is drawn for each row, and either side is filled
    up to the length of a block.

    Args:
        length: tokens of a block.
        end: id of the token that ends a text.
    """

    length: int
    end: int

    architecture = "encoder_decoder"

    @property
    def block(self):
        return self.length

    def __call__(self, tokens_BL, rng):
        first_B1 = rng.integers(1, self.length, (len(tokens_BL), 1))
        place_L = np.arange(self.length)
        encoder = np.where(place_L < first_B1, tokens_BL, 0)
        rest_BL = np.minimum(place_L + first_B1, self.length - 1)
        rest = np.take_along_axis(tokens_BL, rest_BL, axis=1)
        counts = place_L < self.length - first_B1
        return _seq2seq(encoder, np.where(counts, rest, 0), place_L < first_B1, counts)


@dataclasses.dataclass(frozen=True)
class Causal:
    """Causal language model: every token from those before it.

    Args:
        length: tokens that the model sees.
    """

    length: int

    architecture = "decoder"

    @property
    def block(self):
        return self.length + 1

    def __call__(self, tokens_BL, rng):
        seen, labels = tokens_BL[:, :-1], tokens_BL[:, 1:]
        x = {"token_ids": seen, "padding_mask": np.ones_like(seen)}
        return x, labels, np.ones(labels.shape, "float32")


@dataclasses.dataclass(frozen=True)
class Masked:
    """Masked language model: tokens that are hidden from an encoder, from those around them.

    Devlin et al. 2019 (https://arxiv.org/abs/1810.04805), section 3.1: of the tokens to guess, 80 %
    are replaced by one sentinel, 10 % by any token, and 10 % stay.

    Args:
        length: tokens of a block.
        sentinel: id that stands for a hidden token; ids below it are those of texts.
        density: share of the tokens to guess.
    """

    length: int
    sentinel: int
    density: float = 0.15

    architecture = "encoder"

    @property
    def block(self):
        return self.length

    @property
    def guesses(self):
        """Tokens to guess in each block."""
        return max(1, round(self.length * self.density))

    def __call__(self, tokens_BL, rng):
        rows = len(tokens_BL)
        place_BM = np.sort(rng.random(tokens_BL.shape).argsort(axis=1)[:, : self.guesses], axis=1)
        labels_BM = np.take_along_axis(tokens_BL, place_BM, axis=1)
        chance_BM = rng.random((rows, self.guesses))
        any_BM = rng.integers(0, self.sentinel, (rows, self.guesses))
        hidden_BM = np.where(chance_BM < 0.9, any_BM, labels_BM)
        hidden_BM = np.where(chance_BM < 0.8, self.sentinel, hidden_BM)
        hidden_BL = tokens_BL.copy()
        np.put_along_axis(hidden_BL, place_BM, hidden_BM.astype(tokens_BL.dtype), axis=1)
        x = {
            "token_ids": hidden_BL,
            "padding_mask": np.ones_like(tokens_BL),
            "mask_positions": place_BM.astype("int32"),
        }
        return x, labels_BM, np.ones(labels_BM.shape, "float32")


OBJECTIVES = {"span": Span, "prefix": Prefix, "causal": Causal, "masked": Masked}


def _parts(rng, rows, total, parts):
    """Lengths, of at least 1, of the parts of a whole, all ways as likely, `[rows, parts]`."""
    cuts = rng.random((rows, total - 1)).argsort(axis=1)[:, : parts - 1] + 1
    ends = np.concatenate([np.sort(cuts, axis=1), np.full((rows, 1), total)], axis=1)
    return np.diff(ends, prepend=0, axis=1)


def _spelled(lengths):
    """For each row the number of the part that each place is in: lengths 2, 3 are 0 0 1 1 1."""
    numbers = np.arange(lengths.shape[1])
    return np.stack([np.repeat(numbers, row) for row in lengths])


def _replaced(tokens_BL, gone_BL, sentinels_BL, end):
    """Tokens with one sentinel for each span that is gone, and the end; rows of one length."""
    first_BL = gone_BL & ~np.pad(gone_BL, ((0, 0), (1, 0)))[:, :-1]
    tokens_BL = np.where(first_BL, sentinels_BL, tokens_BL)
    kept = tokens_BL[~gone_BL | first_BL].reshape(len(tokens_BL), -1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=end)


def _seq2seq(encoder, decoder, encoder_mask=None, decoder_mask=None):
    """A batch of an encoder-decoder; the decoder starts with the token that pads, 0."""
    mask = np.ones_like(decoder) if decoder_mask is None else decoder_mask
    inputs = np.pad(decoder, ((0, 0), (1, 0)))[:, :-1]
    x = {
        "encoder_token_ids": encoder,
        "encoder_padding_mask": np.ones_like(encoder) if encoder_mask is None else encoder_mask,
        "decoder_token_ids": inputs,
        "decoder_padding_mask": mask,
    }
    return {name: v.astype("int32") for name, v in x.items()}, decoder, mask.astype("float32")
