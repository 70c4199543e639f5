"""What a model learns from blocks of text, each a function of token ids to a batch.

B rows, L tokens of a block, N places after some are replaced, P spans of noise, M tokens to guess.

Every batch has the same shapes; ids and labels are int32, weights float32. A sentinel stands for
what is missing; the first one is the last id of the tokenizer, the next the one before it, as in T5
(`zoo.t5_tokenizer`). The documents of a block are packed: a model sees across the tokens that end
them, where T5 has none between documents, and BERT one document, or two, in a block.
"""

import dataclasses

import numpy as np

from keras_moe.routing.base import positive_integer


@dataclasses.dataclass(frozen=True)
class Span:
    """Span corruption: the decoder says what is missing from the encoder's text.

    Raffel et al. 2020 (https://arxiv.org/abs/1910.10683), section 3.1.4: a share of the tokens, in
    spans, is replaced by one sentinel for each span; the decoder says each sentinel and what it
    stands for. As T5 draws them, a block begins with tokens that stay and ends with noise, and has
    as many tokens as leave the encoder `length`: 568 for 512.

    An end token that is hidden, between two documents, has weight 0: a decoder that learns to say
    it would learn to go on after it, too.

    Args:
        length: tokens that the encoder sees, at most.
        sentinel: id of the first sentinel.
        end: id of the token that ends a text.
        density: share of the tokens that are noise.
        mean_span: tokens of a span, in the mean.
        sentinels: how many there are.

    Call arguments:
        tokens_BL: int32 `[rows, block]`.
        rng: generator of NumPy.

    Returns:
        When called: inputs of a `Seq2SeqLM`, labels and weights, each `[rows, tokens]`, as many
        for all of the encoder, and for all of the decoder.

    Raises:
        ValueError: if an argument is out of range, or there are more spans than sentinels.
    """

    length: int
    sentinel: int
    end: int
    density: float = 0.15
    mean_span: float = 3.0
    sentinels: int = 100

    architecture = "encoder_decoder"

    def __post_init__(self):
        positive_integer("length", self.length)
        _check_density(self.density)
        if not 1 <= self.mean_span < float("inf"):
            raise ValueError(
                f"`mean_span` must be at least 1. Received: mean_span={self.mean_span}"
            )
        _, spans = self._noise(self.block)
        if spans > self.sentinels:
            raise ValueError(
                f"`density` and `mean_span` must make {self.sentinels} spans or fewer. Received: "
                f"density={self.density}, mean_span={self.mean_span}, which make {spans}"
            )

    @property
    def block(self):
        """Tokens of a block, the most of which `length` are left for the encoder."""
        block = 2
        while self._seen(block + 1) <= self.length:
            block += 1
        return block

    def _noise(self, block):
        """Tokens that are noise, and spans of them; at least one token of either kind stays."""
        tokens = int(np.clip(round(block * self.density), 1, block - 1))
        spans = int(np.clip(round(tokens / self.mean_span), 1, min(tokens, block - tokens)))
        return tokens, spans

    def _seen(self, block):
        """Tokens of the encoder: what is left, the sentinels, and the end."""
        tokens, spans = self._noise(block)
        return block - tokens + spans + 1

    def __call__(self, tokens_BL, rng):
        rows, block = tokens_BL.shape
        noise, spans = self._noise(block)
        kept_BP = _part_lengths(rng, rows, block - noise, spans)
        lost_BP = _part_lengths(rng, rows, noise, spans)
        lengths_BQ = np.stack([kept_BP, lost_BP], axis=-1).reshape(rows, -1)  # in turn, Q = 2 P
        part_BL = _part_numbers(lengths_BQ)
        is_noise_BL = part_BL % 2 == 1
        sentinels_BL = self.sentinel - part_BL // 2
        encoder_BN = _replaced(tokens_BL, is_noise_BL, sentinels_BL, self.end)
        # The other way round what is kept is the noise; its first span is what begins a block.
        decoder_BN = _replaced(tokens_BL, ~is_noise_BL, sentinels_BL, self.end)
        counts_BN = decoder_BN != self.end
        counts_BN[:, -1] = True
        x, labels_BN, _ = _seq2seq(encoder_BN, decoder_BN)
        return x, labels_BN, counts_BN.astype("float32")


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prefix language model: the decoder goes on where the encoder's text ends.

    Raffel et al. 2020, section 3.2.1. The place is drawn for each row, and either side is filled
    up to the length of a block. The text goes on where the block ends, so no end is said there.

    Args:
        length: tokens of a block.

    Call arguments:
        tokens_BL: int32 `[rows, length]`.
        rng: generator of NumPy.

    Returns:
        When called: inputs of a `Seq2SeqLM`, labels and weights, each `[rows, length]`.
    """

    length: int

    architecture = "encoder_decoder"

    @property
    def block(self):
        return self.length

    def __call__(self, tokens_BL, rng):
        first_B1 = rng.integers(1, self.length, (len(tokens_BL), 1))
        place_L = np.arange(self.length)
        encoder_BL = np.where(place_L < first_B1, tokens_BL, 0)
        shifted_BL = np.minimum(place_L + first_B1, self.length - 1)
        decoder_BL = np.take_along_axis(tokens_BL, shifted_BL, axis=1)
        counts_BL = place_L < self.length - first_B1
        decoder_BL = np.where(counts_BL, decoder_BL, 0)
        return _seq2seq(encoder_BL, decoder_BL, place_L < first_B1, counts_BL)


@dataclasses.dataclass(frozen=True)
class Causal:
    """Causal language model: every token from those before it.

    Args:
        length: tokens that the model sees.

    Call arguments:
        tokens_BL: int32 `[rows, length + 1]`.
        rng: not used.

    Returns:
        When called: inputs of a `CausalLM`, labels and weights, each `[rows, length]`.
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
    are replaced by one sentinel, 10 % by any ordinary token, and 10 % stay. Special tokens are
    guessed only where a block has too few others, and then have weight 0.

    Args:
        length: tokens of a block.
        sentinel: id that stands for a hidden token.
        ordinary: first id of an ordinary token, and the one after the last.
        density: share of the tokens to guess.

    Call arguments:
        tokens_BL: int32 `[rows, length]`.
        rng: generator of NumPy.

    Returns:
        When called: inputs of an `EncoderMaskedLM`, `[rows, length]` and the places to guess, with
        labels and weights `[rows, guesses]`.

    Raises:
        ValueError: if an argument is out of range.
    """

    length: int
    sentinel: int
    ordinary: tuple
    density: float = 0.15

    architecture = "encoder"

    def __post_init__(self):
        positive_integer("length", self.length)
        _check_density(self.density)

    @property
    def block(self):
        return self.length

    @property
    def guesses(self):
        """Tokens to guess in each block."""
        return max(1, round(self.length * self.density))

    def __call__(self, tokens_BL, rng):
        first, end = self.ordinary
        special_BL = (tokens_BL < first) | (tokens_BL >= end)
        order_BL = (rng.random(tokens_BL.shape) + special_BL).argsort(axis=1)  # special ones last
        place_BM = np.sort(order_BL[:, : self.guesses], axis=1)
        labels_BM = np.take_along_axis(tokens_BL, place_BM, axis=1)
        counts_BM = ~np.take_along_axis(special_BL, place_BM, axis=1)
        chance_BM = rng.random(labels_BM.shape)
        any_BM = rng.integers(first, end, labels_BM.shape)
        hidden_BM = np.where(chance_BM < 0.9, any_BM, labels_BM)
        hidden_BM = np.where(chance_BM < 0.8, self.sentinel, hidden_BM)
        hidden_BL = tokens_BL.copy()
        np.put_along_axis(hidden_BL, place_BM, hidden_BM.astype("int32"), axis=1)
        x = {
            "token_ids": hidden_BL,
            "padding_mask": np.ones_like(tokens_BL),
            "mask_positions": place_BM.astype("int32"),
        }
        return x, labels_BM, counts_BM.astype("float32")


OBJECTIVES = {"span": Span, "prefix": Prefix, "causal": Causal, "masked": Masked}


def _check_density(density):
    if not 0 < density < 1:
        raise ValueError(f"`density` must be in (0, 1). Received: density={density}")


def _part_lengths(rng, rows, total, parts):
    """Lengths, of at least 1, of the parts of a whole, all ways as likely, `[rows, parts]`."""
    cuts_BP = rng.random((rows, total - 1)).argsort(axis=1)[:, : parts - 1] + 1
    ends_BP = np.concatenate([np.sort(cuts_BP, axis=1), np.full((rows, 1), total)], axis=1)
    return np.diff(ends_BP, prepend=0, axis=1)


def _part_numbers(lengths_BQ):
    """For each row the number of the part that each place is in: lengths 2, 3 are 0 0 1 1 1."""
    numbers_Q = np.arange(lengths_BQ.shape[1])
    return np.stack([np.repeat(numbers_Q, row) for row in lengths_BQ])


def _replaced(tokens_BL, gone_BL, sentinels_BL, end):
    """Tokens with one sentinel for each span that is gone, and the end; rows of one length."""
    first_BL = gone_BL & ~np.pad(gone_BL, ((0, 0), (1, 0)))[:, :-1]
    tokens_BL = np.where(first_BL, sentinels_BL, tokens_BL)
    kept_BN = tokens_BL[~gone_BL | first_BL].reshape(len(tokens_BL), -1)
    return np.pad(kept_BN, ((0, 0), (0, 1)), constant_values=end).astype("int32")


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
