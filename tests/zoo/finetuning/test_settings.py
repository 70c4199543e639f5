import pytest

import zoo
from zoo.finetuning.settings import settle

NAMES = ("size", "num_experts", "epochs", "dropout", "expert_dropout", "max_length")


def some(settings):
    return [settings[name] for name in NAMES]


def test_fewer_examples_than_a_batch():
    assert settle("glue/cola", max_examples=16, batch_size=16)["max_examples"] == 16
    with pytest.raises(ValueError, match="`max_examples`.* 16.*max_examples=15"):
        settle("glue/cola", max_examples=15, batch_size=16)


def test_defaults_of_models_from_scratch():
    assert settle("glue/sst2") == settle("glue/sst2", "switch")
    assert some(settle("glue/sst2")) == ["mini", 8, 2, 0.2, None, 64]
    assert some(settle("glue/sst2", "dense")) == ["mini", None, 2, 0.2, None, 64]
    typed = dict(zip(NAMES, ["tiny", 4, 7, 0.0, 0.3, 32], strict=True))
    assert settle("glue/sst2", **typed).items() >= typed.items()


def test_defaults_of_presets(masked_lm, dense_masked_lm):
    settings = settle("glue/rte", preset=masked_lm)
    assert some(settings) == [None, None, 3, 0.1, 0.4, 128]
    assert (settings["model"], settings["preset"]) == (None, masked_lm)
    assert some(settle("glue/rte", preset=dense_masked_lm)) == [None, None, 3, 0.1, None, 128]
    chosen = settle("glue/rte", preset=masked_lm, dropout=0.0, expert_dropout=0.2, max_length=16)
    assert some(chosen) == [None, None, 3, 0.0, 0.2, 16]


def test_how_pairs_are_read(masked_lm):
    assert settle("glue/cola")["pairs"] is settle("glue/cola", preset=masked_lm)["pairs"] is None
    assert settle("glue/rte")["pairs"] == settle("glue/rte", preset=masked_lm)["pairs"] == "apart"
    assert settle("glue/rte", pairs="together")["pairs"] == "together"
    with pytest.raises(ValueError, match="`pairs`.*'both'"):
        settle("glue/rte", pairs="both")
    with pytest.raises(ValueError, match="`pairs`.*'apart'.*'glue/cola'"):
        settle("glue/cola", pairs="apart")


def test_heads_that_compare_see_all_layers_of_a_preset(masked_lm):
    for task, mixed in (("glue/rte", True), ("glue/cola", False)):
        assert settle(task)["mix_layers"] is False
        assert settle(task, preset=masked_lm)["mix_layers"] is mixed
        assert settle(task, preset=masked_lm, load_weights=False)["mix_layers"] is mixed
        for chosen in (True, False):
            assert settle(task, preset=masked_lm, mix_layers=chosen)["mix_layers"] is chosen
    with pytest.raises(ValueError, match="`mix_layers`.*'all'"):
        settle("glue/cola", mix_layers="all")
    together = {"preset": masked_lm, "pairs": "together"}  # and nothing is compared
    assert settle("glue/rte", **together)["mix_layers"] is False
    assert settle("glue/rte", **together, mix_layers=True)["mix_layers"] is True


def test_weights_of_a_preset(masked_lm):
    assert settle("glue/cola")["load_weights"] is None
    assert settle("glue/cola", preset=masked_lm)["load_weights"] is True
    assert settle("glue/cola", preset=masked_lm, load_weights=False)["load_weights"] is False
    with pytest.raises(ValueError, match="`load_weights`.*False"):
        settle("glue/cola", load_weights=False)
    with pytest.raises(ValueError, match="`load_weights`.*0"):
        settle("glue/cola", preset=masked_lm, load_weights=0)


def test_what_is_trained(masked_lm, dense_masked_lm):
    """The experts of a preset know something, new ones do not."""
    assert settle("glue/cola")["train"] == "all"
    assert settle("glue/cola", preset=dense_masked_lm)["train"] == "all"
    assert settle("glue/cola", preset=masked_lm)["train"] == "frozen_experts"
    assert settle("glue/cola", preset=masked_lm, load_weights=False)["train"] == "all"
    assert settle("glue/cola", preset=masked_lm, train="all")["train"] == "all"


def test_rank_of_lora():
    assert settle("glue/rte")["lora_rank"] is None
    assert settle("glue/rte", train="lora")["lora_rank"] == 8
    assert settle("glue/rte", train="lora", lora_rank=2)["lora_rank"] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "base"),
        ("num_experts", 4),
        ("model", "switch"),
        ("train", "one"),
        ("lora_rank", 8),  # without LoRA
    ],
)
def test_what_a_preset_refuses(masked_lm, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{name}={value!r}"):
        settle("glue/cola", preset=masked_lm, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 4),
        ("expert_dropout", 0.5),
        ("train", "frozen_experts"),
        ("train", "non_experts"),
        ("train", "experts"),
    ],
)
def test_what_a_dense_model_refuses(dense_masked_lm, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{name}={value!r}.*model='dense'"):
        settle("glue/cola", "dense", **{name: value})
    if name != "num_experts":
        with pytest.raises(ValueError, match=f"`{name}`.*{name}={value!r}.*{dense_masked_lm}"):
            settle("glue/cola", preset=dense_masked_lm, **{name: value})


def test_a_preset_of_another_kind(tmp_path):
    backbone = zoo.dense_transformer("tiny", 10, architecture="decoder")
    zoo.CausalLM(backbone).save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}"):
        settle("glue/cola", preset=tmp_path)
    with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}/none"):
        settle("glue/cola", preset=tmp_path / "none")
