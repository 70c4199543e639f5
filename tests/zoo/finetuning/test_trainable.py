import numpy as np
import pytest

import zoo
from tests.backend import numpy
from tests.zoo.finetuning.small import run
from zoo import runs
from zoo.finetuning import trainable

EXPERTS = {f"moe_1/experts/kernel_{name}" for name in ("in", "out")}
ROUTERS = {"moe_1/router/kernel"}
ADAPTED = {f"attention/{name}/kernel" for name in ("query", "value")}


def weights(preset):
    """Name, without the block's, -> value of all that can be trained of a preset's encoder."""
    trained = zoo.from_preset(preset).backbone.trainable_weights
    return {w.path.partition("block_1/")[2] or w.path: numpy(w) for w in trained}


@pytest.mark.parametrize(
    ("train", "moved"),
    [
        ("all", lambda names: names),
        ("frozen_experts", lambda names: names - EXPERTS),
        ("non_experts", lambda names: names - EXPERTS - ROUTERS),
        ("experts", lambda names: EXPERTS | ROUTERS),
        ("lora", lambda names: ADAPTED),
    ],
)
def test_only_some_weights_move(masked_lm, tmp_path, train, moved):
    results = run(tmp_path, preset=masked_lm, train=train, max_examples=32)
    before, after = weights(masked_lm), weights(results["preset"])
    assert EXPERTS | ROUTERS | ADAPTED < before.keys() == after.keys()
    changed = {name for name in before if np.any(before[name] != after[name])}
    assert changed == moved(set(before))


def test_all_but_the_experts_move_under_a_head_that_mixes_layers(masked_lm, tmp_path):
    """Of a pair of texts; the last norm has no part in it."""
    results = run(tmp_path, "glue/rte", preset=masked_lm, max_examples=32)
    assert results["settings"]["mix_layers"] and results["settings"]["train"] == "frozen_experts"
    before, after = weights(masked_lm), weights(results["preset"])
    (norm,) = before.keys() - after.keys()
    assert norm.startswith("output_norm")
    changed = {name for name in after if np.any(before[name] != after[name])}
    assert changed == set(after) - EXPERTS
    scores = numpy(zoo.from_preset(results["preset"]).get_layer("mixed_layers").scores)
    assert scores.shape == (2,) and scores.all()


@pytest.mark.parametrize("train", trainable.TRAIN)
def test_the_head_is_trained_always(masked_lm, train):
    classifier = zoo.from_preset(masked_lm, num_classes=2)
    trainable.choose(classifier, train, 2)
    trained = {id(weight) for weight in classifier.trainable_weights}
    assert {id(weight) for weight in classifier.get_layer("logits").weights} <= trained


def test_lora_goes_on_where_it_was(masked_lm, tmp_path, monkeypatch):
    """Keras' own file of weights forgets the factors."""
    options = {"preset": masked_lm, "train": "lora", "lora_rank": 2, "epochs": 3}
    options["max_examples"] = 32
    whole = run(tmp_path / "whole", **options)

    def save(self, model, logs, seconds, original=runs.Run.save):
        if self.epoch == 2:
            raise KeyboardInterrupt
        original(self, model, logs, seconds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save", save)
        run(tmp_path / "cut", **options)
    resumed = run(tmp_path / "cut", **options)
    for one, other in zip(whole["history"], resumed["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    ours, theirs = weights(resumed["preset"]), weights(whole["preset"])
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_lora_has_few_weights_to_train(masked_lm):
    classifier = zoo.from_preset(masked_lm, num_classes=2)
    trainable.choose(classifier, "lora", 2)
    names = [w.path.rpartition("/")[2] for w in classifier.trainable_weights]
    assert sorted(names) == sorted(["lora_kernel_a", "lora_kernel_b"] * 2 + ["kernel", "bias"])
