"""What KerasHub's samplers must say, by loops over the logits of the whole model."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_moe
import zoo
from tests.backend import numpy

V, LENGTH, ROWS, DRAWS = 20, 7, 3, 600
TINY = {
    "vocabulary_size": V,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "key_dim": 4,
    "intermediate_dim": 12,
    "num_experts": 4,
}


class Case:
    """A language model, the inputs that are the same in all calls, and the prompts of two texts."""

    prompts = ([3, 8], [5, 9, 2, 4])

    def __init__(self, kind):
        if kind == "decoder":
            router = keras_moe.TopKRouter(2)
            backbone = zoo.DecoderBackbone(**TINY, router=router, positions="rotary")
            self.lm, states = zoo.CausalLM(backbone), backbone.output
            self.side, self.others = "", {}
        else:
            router = keras_moe.SwitchRouter(eval_capacity_factor=None)
            options = TINY | {"num_layers": 1, "num_decoder_layers": 2}
            backbone = zoo.EncoderDecoderBackbone(**options, router=router)
            self.lm = zoo.Seq2SeqLM(backbone)
            states = backbone.output["decoder_sequence_output"]
            self.side = "decoder_"
            self.others = {
                "encoder_token_ids": np.array([[4, 7, 11, 6]]),
                "encoder_padding_mask": np.array([[1, 1, 1, 0]]),
            }
        rng = np.random.default_rng(5)
        for variable in backbone.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        self.whole = keras.Model(self.lm.input, {"states": states, "logits": self.lm.output})

    def inputs(self, texts, length=LENGTH):
        """The texts, filled up to a length, and a mask of their own tokens."""
        given = np.arange(length) < np.array([len(text) for text in texts])[:, None]
        tokens = np.zeros(given.shape, "int32")
        tokens[given] = np.concatenate(texts)
        others = {name: np.repeat(x, len(texts), axis=0) for name, x in self.others.items()}
        own = {"token_ids": tokens, "padding_mask": given.astype("int32")}
        return others | {f"{self.side}{name}": x for name, x in own.items()}

    def read(self, texts):
        """Of each of up to `ROWS` texts the states of its tokens, and what the next may be."""
        padded = [*texts, *[texts[0]] * (ROWS - len(texts))]  # one shape, compiled once
        outputs = self.whole.predict_on_batch(self.inputs(padded))
        result = []
        for text, states, logits in zip(texts, outputs["states"], outputs["logits"], strict=False):
            last = logits[len(text) - 1].astype("float64")
            log_p = last - np.log(np.exp(last - last.max()).sum()) - last.max()
            result.append((states[: len(text)], log_p))
        return result

    def write(self, sampler, prompts=prompts, length=LENGTH):
        self.lm.compile(sampler=sampler)
        outputs = self.lm.generate(self.inputs(prompts, length), stop_token_ids=None)
        return numpy(outputs[f"{self.side}token_ids"]).tolist()


@pytest.fixture(scope="module", params=["decoder", "encoder and decoder"])
def case(request):
    return Case(request.param)


def greedy(case, text):
    while len(text) < LENGTH:
        text = [*text, int(case.read([text])[0][1].argmax())]
    return text


def contrastive(case, text, k, alpha):
    """Su et al. 2022, https://arxiv.org/abs/2202.06417, Eq. 5."""
    while len(text) < LENGTH:
        ((states, log_p),) = case.read([text])
        candidates = np.argsort(log_p)[-k:].tolist()
        scores = []
        for v, (with_v, _) in zip(
            candidates, case.read([[*text, v] for v in candidates]), strict=True
        ):
            h = with_v[-1] / np.linalg.norm(with_v[-1])
            similarity = max(h @ state / np.linalg.norm(state) for state in states)
            scores.append((1 - alpha) * np.exp(log_p[v]) - alpha * similarity)
        text = [*text, candidates[int(np.argmax(scores))]]
    return text


def beam(case, text, num_beams):
    """The most probable of the texts that were among the best at every length."""
    beams = [(0.0, text)]
    while len(beams[0][1]) < LENGTH:
        read = case.read([text for _, text in beams])
        longer = [
            (total + log_p[v], [*text, v])
            for (total, text), (_, log_p) in zip(beams, read, strict=True)
            for v in range(V)
        ]
        beams = sorted(longer, reverse=True)[:num_beams]
    return beams[0][1]


@pytest.mark.parametrize(
    "sampler",
    ["greedy", keras_hub.samplers.TopKSampler(k=1), keras_hub.samplers.TopPSampler(p=1e-6)],
    ids=["greedy", "top k", "top p"],
)
def test_the_best_token(case, sampler):
    assert case.write(sampler) == [greedy(case, prompt) for prompt in case.prompts]


def test_contrastive_search(case):
    expected = [contrastive(case, prompt, k=3, alpha=0.6) for prompt in case.prompts]
    assert case.write(keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.6)) == expected
    assert expected != [greedy(case, prompt) for prompt in case.prompts]


def test_beam_search(case):
    expected = [beam(case, prompt, num_beams=3) for prompt in case.prompts]
    assert case.write(keras_hub.samplers.BeamSampler(num_beams=3)) == expected
    assert expected != [greedy(case, prompt) for prompt in case.prompts]


def test_beams_keep_the_order_of_the_texts(case):
    """Texts whose prompts are of one length are written at a time."""
    prompts = ([5, 9, 2, 4], [3, 8], [7, 6, 1])
    texts = case.write(keras_hub.samplers.BeamSampler(num_beams=2), prompts, length=5)
    pairs = zip(texts, prompts, strict=True)
    assert [text[: len(prompt)] for text, prompt in pairs] == list(prompts)


def test_the_token_that_stops_a_text_is_part_of_it(case):
    prompt = case.prompts[0]
    text = greedy(case, prompt)
    stop = text[-2]
    case.lm.compile(sampler="greedy")
    outputs = case.lm.generate(case.inputs([prompt]), stop_token_ids=[stop])
    (mask,) = numpy(outputs[f"{case.side}padding_mask"])
    assert mask.sum() == text.index(stop, len(prompt)) + 1


def test_only_pieces_of_the_tokenizer_are_written():
    """The table has more rows, which are likelier."""
    tokenizer = zoo.default_tokenizer()
    preprocessor = zoo.LstmCausalLMPreprocessor(tokenizer, sequence_length=4)
    lm = zoo.moe_lstm("MoE-4", preprocessor=preprocessor, hidden_dim=8, expert_dim=4)
    bias = np.zeros(8192)
    bias[tokenizer.vocabulary_size() :] = 200
    bias[tokenizer.token_to_id("▁fox")] = 100
    lm.logits.bias.assign(bias)
    lm.compile(sampler="greedy")
    assert set(lm.generate("the", max_length=4).split()) == {"the", "fox"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("TopKSampler", {"k": 4, "temperature": 0.5}), ("TopPSampler", {"p": 0.5})],
)
def test_drawn_by_probability_from_the_best(case, kind, options):
    """Of the first new token: which ones there are, and how often."""
    prompt = case.prompts[0]
    p = np.exp(case.read([prompt])[0][1] / options.get("temperature", 1))
    p = p / p.sum()
    order = np.argsort(-p)[: options.get("k", V)]
    if "p" in options:  # the fewest that have more than p together
        order = order[: np.searchsorted(np.cumsum(p[order]), options["p"]) + 1]
    assert 1 < len(order) < V
    expected = np.zeros(V)
    expected[order] = p[order] / p[order].sum()
    sampler = getattr(keras_hub.samplers, kind)(**options, seed=0)
    texts = case.write(sampler, [prompt] * DRAWS, length=len(prompt) + 1)
    drawn = np.bincount([text[-1] for text in texts], minlength=V)
    assert set(drawn.nonzero()[0]) <= set(order)
    # Four standard deviations: of a share s of n draws it is the root of s (1 - s) / n.
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(drawn / DRAWS - expected) <= 4 * deviation).all()
    assert all(drawn[v] for v in order if expected[v] > 0.02)  # but once in 10^5
