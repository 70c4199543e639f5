"""Small models that transformers makes and saves, loaded here, against transformers itself."""

import json
import warnings

import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model

import zoo
from keras_moe import MixtureOfExperts, SwitchRouter, TopKRouter
from tests.backend import marked, numpy
from tests.zoo.conversion.small_t5 import (
    FAMILIES,
    IDS,
    INPUTS,
    LABELS,
    MASK,
    SWITCH,
    close,
    run_theirs,
    theirs,
)
from zoo.conversion import load_transformers, save_transformers


@pytest.fixture(scope="module", params=marked(FAMILIES, "t5", "mt5", "switch"))
def pair(request, tmp_path_factory):
    """transformers' model, the folder it wrote, and what is loaded from there."""
    folder = tmp_path_factory.mktemp("checkpoint") / "theirs"
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, folder, load_transformers(folder)


def test_states_logits_and_loss_agree(pair):
    model, _, loaded = pair
    expected = run_theirs(model)
    states = loaded.backbone.output["encoder_sequence_output"]
    both = keras.Model(loaded.input, {"states": states, "logits": loaded.output})
    ours = both.predict(INPUTS, verbose=0)
    valid = MASK.astype(bool)
    close(ours["states"][valid], expected.encoder_last_hidden_state[torch.tensor(valid)])
    close(ours["logits"], expected.logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(LABELS, ours["logits"])
    close(loss, expected.loss)


def test_router_choices_agree(pair):
    model, _, loaded = pair
    if "Switch" not in type(model).__name__:
        pytest.skip("a dense model has no router")
    chosen = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: chosen.append((args[0], out)))
        for module in model.modules()
        if type(module).__name__ == "SwitchTransformersTop1Router"
    ]
    run_theirs(model)
    for hook in hooks:
        hook.remove()
    blocks = [*loaded.backbone.encoder_blocks, *loaded.backbone.decoder_blocks]
    mixtures = [b.feed_forward for b in blocks if hasattr(b.feed_forward, "router")]
    assert len(chosen) == len(mixtures) == 3
    for (states, (kept, _, logits)), mixture in zip(chosen, mixtures, strict=True):
        routing = mixture.router(states.detach().numpy(), training=False)
        close(routing.logits, logits)
        slot = ops.convert_to_numpy(routing.slot_index)[..., 0]
        empty = np.prod(np.shape(ops.convert_to_numpy(routing.token_index))[1:])
        expert = ops.convert_to_numpy(routing.expert_index)[..., 0]
        ours = np.eye(3)[expert] * (slot < empty)[..., None]
        np.testing.assert_array_equal(ours, kept.numpy())
    if model.config.expert_capacity == 2:
        assert sum(float(1 - out[0].sum(-1).float().mean()) for _, out in chosen) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generations_agree(family, tmp_path):
    model = theirs(family, lively=True)
    model.save_pretrained(tmp_path)
    loaded = load_transformers(tmp_path)
    expected = model.generate(
        input_ids=torch.tensor(IDS),
        attention_mask=torch.tensor(MASK),
        max_new_tokens=11,
        do_sample=False,
        eos_token_id=None,
    ).numpy()
    prompt = np.zeros((2, 12), "int32")
    given = np.zeros((2, 12), "int32")
    given[:, 0] = 1
    loaded.compile(sampler="greedy")
    inputs = {**INPUTS, "decoder_token_ids": prompt, "decoder_padding_mask": given}
    ours = loaded.generate(inputs, stop_token_ids=None)["decoder_token_ids"]
    assert len(np.unique(expected)) > 3  # or it would show little
    np.testing.assert_array_equal(ours, expected)


def test_written_back_transformers_loads_it(pair, tmp_path):
    model, _, loaded = pair
    save_transformers(loaded, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    # mT5 is T5 1.1 with another vocabulary, and is written as such.
    kind = transformers.T5ForConditionalGeneration if "T5" in type(model).__name__ else type(model)
    again = kind.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(
        run_theirs(again).logits, run_theirs(model).logits, rtol=1e-5, atol=1e-5
    )
    back = load_transformers(tmp_path / "ours")
    for ours, before in zip(back.weights, loaded.weights, strict=True):
        if ours.trainable:
            np.testing.assert_array_equal(*map(ops.convert_to_numpy, (ours.value, before.value)))


def test_one_expert_there_and_back(tmp_path):
    """Its kernels have no axis of experts there."""
    options = {**SWITCH, "num_experts": 1}
    model = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**options)
    ).eval()
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    close(loaded.predict(INPUTS, verbose=0), run_theirs(model).logits)
    save_transformers(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    close(run_theirs(again).logits.numpy(), run_theirs(model).logits)


@pytest.mark.parametrize("family", ["t5", "switch"])
def test_trains_on_and_is_written_back(family, tmp_path):
    model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    blocks = (*loaded.backbone.encoder_blocks, *loaded.backbone.decoder_blocks)
    layers = [block.feed_forward for block in blocks]
    mixtures = [layer for layer in layers if isinstance(layer, MixtureOfExperts)]
    assert len(mixtures) == (3 if family == "switch" else 0)
    parts = [v for layer in mixtures for v in layer.trainable_variables]
    parts.append(loaded.backbone.token_embedding.embeddings)
    before = [numpy(v) for v in parts]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loaded.compile(keras.optimizers.Adam(1e-2), loss=loss)
    at_first, _ = loaded.evaluate(INPUTS, LABELS, verbose=0)  # without dropout
    loaded.fit(INPUTS, LABELS, epochs=8, verbose=0)
    total, _ = loaded.evaluate(INPUTS, LABELS, verbose=0)
    assert total < 0.9 * at_first
    alone = float(loss(LABELS, loaded.predict(INPUTS, verbose=0)))
    loaded(INPUTS)
    routers = float(sum(numpy(x) for x in loaded.losses))
    assert total == pytest.approx(alone + routers, rel=1e-4)
    assert (routers > 1e-3) == bool(mixtures)
    for variable, old in zip(parts, before, strict=True):
        assert (numpy(variable) != old).any()
    save_transformers(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    close(loaded.predict(INPUTS, verbose=0), run_theirs(again).logits)


@pytest.mark.parametrize("family", ["t5", "switch"])
def test_logits_of_their_own_where_the_config_says_tied(family, tmp_path):
    """The outputs are scaled because the config says so, whatever they are multiplied by."""
    model = theirs(family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"].copy()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_transformers(tmp_path).backbone.tie_embeddings
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_transformers(tmp_path)
    assert not loaded.backbone.tie_embeddings and loaded.backbone.scale_outputs
    expected = run_theirs(type(model).from_pretrained(tmp_path).eval()).logits
    close(loaded.predict(INPUTS, verbose=0), expected)
    save_transformers(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(run_theirs(again).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sparse", "num_losses"),
    [((2, 1), 2), ((4, 1), 1), ((4, 2), 0)],
    ids=["both", "decoder only", "all blocks are sparse"],
)
def test_router_losses_agree_at_balance(sparse, num_losses, tmp_path):
    """With a router that is next to nothing all probabilities are 1/E, whoever is chosen.

    The balancing loss of each side is then 1 and its z-loss log(E)^2, of however many blocks.
    """
    options = {**SWITCH, "router_aux_loss_coef": 0.03, "router_z_loss_coef": 0.02}
    for side, number in zip(("encoder", "decoder"), sparse, strict=True):
        options[f"num_sparse_{side}_layers"] = number
    config = transformers.SwitchTransformersConfig(**options)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 1e-6 if "router" in name else 1
    model.save_pretrained(tmp_path / "theirs")
    ids = {"input_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)}
    with torch.no_grad():
        expected = float(model(**ids, output_router_logits=True).loss - model(**ids).loss)
    assert expected == pytest.approx(num_losses * (0.03 + 0.02 * np.log(3) ** 2), abs=1e-5)
    loaded = load_transformers(tmp_path / "theirs")
    loaded(INPUTS)
    assert float(sum(loaded.losses)) == pytest.approx(expected, abs=1e-5)
    save_transformers(loaded, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    if num_losses:
        assert written["router_aux_loss_coef"] == pytest.approx(0.03, rel=1e-12)
        assert written["router_z_loss_coef"] == pytest.approx(0.02, rel=1e-12)


def test_one_coefficient_is_written_for_two_depths(tmp_path):
    """Ours: 0.01 for each of 2 sparse blocks, and of 1. Theirs: 0.015 for either side."""
    backbone = zoo.EncoderDecoderBackbone(
        vocabulary_size=10,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=1,
        hidden_dim=4,
        key_dim=4,
        intermediate_dim=4,
        num_experts=2,
        router=SwitchRouter(capacity_factor=None, eval_capacity_factor=None),
    )
    save_transformers(zoo.Seq2SeqLM(backbone), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["router_aux_loss_coef"] == pytest.approx(0.015)


@pytest.mark.parametrize("family", ["t5", "switch"])
def test_float16_warns(family, tmp_path):
    theirs(family).half().save_pretrained(tmp_path)
    for dtype, name in (("float16", "float16"), ("mixed_float16", "mixed_float16"), ("auto", "fl")):
        with pytest.warns(UserWarning, match=f"`dtype='bfloat16'`.*dtype={name}"):
            load_transformers(tmp_path, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_transformers(tmp_path, "bfloat16", load_weights=False)


TABLES = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]


@pytest.mark.parametrize("kept", [TABLES[1:2], TABLES[2:], TABLES[1:], TABLES])
@pytest.mark.parametrize("family", ["t5", "t5 1.1"])
def test_the_embedding_table_by_any_of_its_names(family, kept, tmp_path):
    model = theirs(family)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights.pop(TABLES[0])
    save_file(weights | {name: table.copy() for name in kept}, tmp_path / "model.safetensors")
    loaded = load_transformers(tmp_path)
    assert loaded.backbone.tie_embeddings == (family == "t5")
    np.testing.assert_array_equal(numpy(loaded.backbone.token_embedding.embeddings), table)


def test_the_embedding_table_by_the_name_that_safetensors_keeps(tmp_path):
    model = theirs("switch")
    model.config.save_pretrained(tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    assert set(TABLES) & set(load_file(tmp_path / "model.safetensors")) == {TABLES[2]}
    close(load_transformers(tmp_path).predict(INPUTS, verbose=0), run_theirs(model).logits)


@pytest.mark.parametrize(
    ("kept", "other"), [(TABLES, TABLES[1]), (TABLES, TABLES[2]), (TABLES[1:], TABLES[2])]
)
def test_embedding_tables_that_differ(kept, other, tmp_path):
    theirs("t5").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights.pop(TABLES[0])
    weights |= {name: table.copy() for name in kept}
    weights[other][3, 2] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"'shared.weight'.*'{other}'"):
        load_transformers(tmp_path)


def test_a_weight_that_t5_never_used(tmp_path):
    model = theirs("t5")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    torch.save({**model.state_dict(), name: torch.ones(8, 3)}, tmp_path / "pytorch_model.bin")
    load_transformers(tmp_path)


def test_settings_are_written_as_they_are(tmp_path):
    router = SwitchRouter(
        capacity_factor=0,
        eval_capacity_factor=0,
        min_capacity=7,
        jitter=0.3,
        load_balancing_weight=0.5,
        router_z_weight=0.25,
    )
    options = {
        "num_layers": 2,
        "num_decoder_layers": 4,
        "num_heads": 3,
        "hidden_dim": 4,
        "key_dim": 5,
        "intermediate_dim": 6,
        "activation": "silu",
        "num_buckets": 8,
        "max_distance": 20,
        "dropout": 0.2,
        "expert_dropout": 0.2,
        "epsilon": 1e-3,
        "group": "sequence",
    }
    backbone = zoo.EncoderDecoderBackbone(10, router=router, num_experts=2, **options)
    save_transformers(zoo.Seq2SeqLM(backbone), tmp_path / "out")
    loaded = load_transformers(tmp_path / "out").backbone
    assert loaded.token_embedding.tie_weights and loaded.scale_outputs
    written = {name: loaded.get_config()[name] for name in options}
    assert written == {name: backbone.get_config()[name] for name in options}
    sides = (loaded.encoder_blocks, loaded.decoder_blocks)
    for router in (blocks[1].feed_forward.router for blocks in sides):
        assert (router.min_capacity, router.jitter) == (7, 0.3)


class TestNotInTransformers:
    TINY = {
        "vocabulary_size": 10,
        "num_layers": 2,
        "num_heads": 1,
        "hidden_dim": 4,
        "key_dim": 4,
        "intermediate_dim": 4,
        "num_experts": 2,
    }
    FIXED = {"capacity_factor": 0, "eval_capacity_factor": 0, "min_capacity": 8}

    def saved(self, path, router=None, **options):
        backbone = zoo.EncoderDecoderBackbone(**(self.TINY | {"router": router} | options))
        save_transformers(zoo.Seq2SeqLM(backbone), path)
        return json.loads((path / "config.json").read_text())

    @pytest.mark.parametrize(
        ("router", "options", "message"),
        [
            (SwitchRouter(), {}, r"`capacity_factor`.*`min_capacity`.*\(1.25, 2.0\)"),
            (
                SwitchRouter(**FIXED, priority="probability"),
                {"decoder_sparse_blocks": ()},
                "priority='probability'",
            ),
            (SwitchRouter(**FIXED, reroutes=1), {"decoder_sparse_blocks": ()}, "reroutes=1"),
            (SwitchRouter(**FIXED), {"group": "batch"}, "group=.'batch', 'sequence'."),
            (SwitchRouter(**FIXED), {"gated": True}, "gated=True"),
            (TopKRouter(2), {}, "`SwitchRouter`.*TopKRouter"),
            (
                SwitchRouter(**FIXED),
                {"decoder_router": SwitchRouter(**{**FIXED, "min_capacity": 9})},
                "`SwitchRouter`.*SwitchRouter$",
            ),
            (SwitchRouter(**FIXED), {"expert_dim": 3}, "expert_dim=3"),
            (SwitchRouter(**FIXED), {"sparse_blocks": (1,)}, r"sparse blocks \(1,\) of 2"),
            (None, {"activation": "tanh"}, "activation=.*tanh.*gated=False"),
        ],
    )
    def test_is_refused_and_nothing_written(self, router, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            self.saved(tmp_path / "out", router, **options)
        assert list(tmp_path.iterdir()) == []

    def test_dropless_has_a_capacity_for_all(self, tmp_path):
        router = SwitchRouter(capacity_factor=None, eval_capacity_factor=None)
        assert self.saved(tmp_path / "out", router)["expert_capacity"] >= 10**9

    @pytest.mark.parametrize("factor", [0, 1e-9], ids=["0", "as earlier versions had it"])
    def test_a_capacity_in_tokens(self, factor, tmp_path):
        router = SwitchRouter(capacity_factor=factor, eval_capacity_factor=factor, min_capacity=7)
        assert self.saved(tmp_path / "out", router)["expert_capacity"] == 7
        for block in load_transformers(tmp_path / "out").backbone.encoder_blocks[1::2]:
            assert block.feed_forward.router.capacity_of(500) == 7

    def test_a_router_without_sparse_blocks_is_t5(self, tmp_path):
        config = self.saved(
            tmp_path / "out", SwitchRouter(), sparse_blocks=(), decoder_sparse_blocks=()
        )
        assert config["model_type"] == "t5"
        load_transformers(tmp_path / "out")


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        theirs("switch").save_pretrained(tmp_path / "model", max_shard_size="20KB")
        return tmp_path / "model"

    def fails(self, folder, message):
        with pytest.raises(ValueError, match=message) as error:
            load_transformers(folder)
        assert "\n" not in str(error.value)

    def change(self, folder, **options):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    def test_config_that_lacks_something(self, folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        del config["d_model"]
        path.write_text(json.dumps(config))
        self.fails(folder, "`d_model`.*d_model=None")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"d_ff": "12"}, "`d_ff`.*d_ff='12'"),
            ({"num_heads": 0}, "`num_heads`.*num_heads=0"),
            ({"num_layers": True}, "`num_layers`.*num_layers=True"),
            ({"dropout_rate": -1}, "`dropout_rate`.*dropout_rate=-1"),
            ({"tie_word_embeddings": 1}, "`tie_word_embeddings`.*tie_word_embeddings=1"),
            (
                {"relative_attention_num_buckets": 2},
                "`relative_attention_num_buckets`.*4.*buckets=2",
            ),
            (
                {"relative_attention_max_distance": 4},
                "`relative_attention_max_distance`.*5.*distance=4",
            ),
            ({"router_bias": True}, "router_bias=True"),
            (
                {"decoder_sparse_step": 1},
                "`decoder_sparse_step`.*`num_sparse_decoder_layers`.*decoder_sparse_step=1",
            ),
        ],
    )
    def test_entries_that_are_wrong(self, folder, options, message):
        self.change(folder, **options)
        self.fails(folder, message)

    def test_sparse_blocks_that_cannot_be(self, folder):
        self.change(folder, num_sparse_encoder_layers=9)
        self.fails(folder, "`num_sparse_encoder_layers`.*4.*num_sparse_encoder_layers=9")

    def test_an_activation_that_is_not_known(self, folder):
        self.change(folder, dense_act_fn="tanh")
        self.fails(folder, "`dense_act_fn`.*relu.*dense_act_fn='tanh'")
