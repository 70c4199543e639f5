"""Small Mixtrals and OLMoEs that transformers makes and saves, against transformers itself."""

import json

import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops
from safetensors.numpy import load_file, save_file

import keras_moe
import zoo
from tests.backend import marked, numpy
from tests.zoo.conversion.small_decoders import (
    FAMILIES,
    IDS,
    INPUTS,
    MASK,
    VALID,
    close,
    run_theirs,
    theirs,
)
from zoo.conversion import load_transformers, save_transformers


@pytest.fixture(scope="module", params=marked(FAMILIES, "mixtral", "olmoe"))
def pair(request, tmp_path_factory):
    """transformers' model, and what is loaded from the folder it wrote."""
    folder = tmp_path_factory.mktemp("checkpoint") / "theirs"
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, load_transformers(folder)


def test_states_logits_and_loss_agree(pair):
    model, loaded = pair
    labels = np.where(VALID, IDS, -100)
    expected = run_theirs(model, labels=torch.tensor(labels), output_hidden_states=True)
    both = keras.Model(
        loaded.input, {"states": loaded.backbone(loaded.input), "logits": loaded.output}
    )
    ours = both.predict(INPUTS, verbose=0)
    close(ours["states"][VALID], expected.hidden_states[-1][torch.tensor(VALID)])
    close(ours["logits"][VALID], expected.logits[torch.tensor(VALID)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
        IDS[:, 1:], ours["logits"][:, :-1], VALID[:, 1:]
    )
    per_label = float(loss) * VALID[:, 1:].size / VALID[:, 1:].sum()
    assert per_label == pytest.approx(float(expected.loss), rel=1e-4)


def test_router_choices_agree(pair):
    model, loaded = pair
    chosen = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: chosen.append((args[0], out)))
        for module in model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    run_theirs(model)
    for hook in hooks:
        hook.remove()
    assert len(chosen) == len(loaded.backbone.blocks) == 2
    for (states, (logits, weights, experts)), block in zip(
        chosen, loaded.backbone.blocks, strict=True
    ):
        routing = block.feed_forward.router(states.reshape(2, 11, 16).numpy(), training=False)
        close(ops.convert_to_numpy(routing.logits).reshape(22, -1), logits)
        of_slots = ops.convert_to_numpy(routing.weight).reshape(-1)  # nothing is dropped
        close(of_slots[ops.convert_to_numpy(routing.slot_index)].reshape(22, 2), weights)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(routing.expert_index).reshape(22, 2), experts
        )


def test_greedy_generations_agree(pair):
    """Prompts of one length: theirs would pad them on the left, ours on the right."""
    model, loaded = pair
    expected = model.generate(
        input_ids=torch.tensor(IDS[:, :4]),
        attention_mask=torch.ones(2, 4),
        max_new_tokens=8,
        do_sample=False,
    ).numpy()
    prompt = np.zeros((2, 12), "int32")
    prompt[:, :4] = IDS[:, :4]
    given = np.broadcast_to(np.arange(12) < 4, (2, 12)).astype("int32")
    loaded.compile(sampler="greedy")
    ours = loaded.generate({"token_ids": prompt, "padding_mask": given}, stop_token_ids=None)
    assert len(np.unique(expected[:, 4:])) > 3  # or it would show little
    np.testing.assert_array_equal(ours["token_ids"], expected)


def test_written_back_transformers_loads_it(pair, tmp_path):
    model, loaded = pair
    save_transformers(loaded, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(
        run_theirs(again).logits, run_theirs(model).logits, rtol=1e-5, atol=1e-5
    )
    back = load_transformers(tmp_path / "ours")
    for ours, before in zip(back.weights, loaded.weights, strict=True):
        if ours.trainable:
            np.testing.assert_array_equal(*map(ops.convert_to_numpy, (ours.value, before.value)))


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_trains_on_and_is_written_back(family, tmp_path):
    model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    parts = [v for block in loaded.backbone.blocks for v in block.feed_forward.trainable_variables]
    assert len(parts) == 2 * 4
    before = [numpy(v) for v in parts]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loaded.compile(keras.optimizers.Adam(3e-3), loss=loss)
    labels = np.roll(IDS, -1, axis=1)
    history = loaded.fit(INPUTS, labels, sample_weight=MASK, epochs=6, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]
    total, _ = loaded.evaluate(INPUTS, labels, sample_weight=MASK, verbose=0)
    alone = float(loss(labels, loaded.predict(INPUTS, verbose=0), MASK))
    loaded(INPUTS)
    routers = float(sum(numpy(x) for x in loaded.losses))
    assert routers > 1e-3 and total == pytest.approx(alone + routers, rel=1e-4)
    for variable, old in zip(parts, before, strict=True):
        assert (numpy(variable) != old).any()
    save_transformers(loaded, tmp_path / "ours")
    expected = run_theirs(type(model).from_pretrained(tmp_path / "ours").eval()).logits
    close(loaded.predict(INPUTS, verbose=0)[VALID], expected[torch.tensor(VALID)])


class TestNotInTransformers:
    TINY = {
        "vocabulary_size": 10,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 4,
        "key_dim": 2,
        "intermediate_dim": 4,
        "num_experts": 2,
        "router": keras_moe.TopKRouter(2),
        "sparse_blocks": (1,),
        "positions": "rotary",
        "gated": True,
        "activation": "silu",
        "tie_embeddings": False,
    }

    @pytest.mark.parametrize(
        ("options", "allowed", "received"),
        [
            ({"positions": "relative"}, "rotary", "'positions': 'relative'"),
            ({"sparse_blocks": ()}, "block", r"'sparse_blocks': \(\)"),
            (
                {"router": keras_moe.TopKRouter(2, capacity_factor=1.0)},
                "`TopKRouter`",
                "'capacity_factor': 1.0",
            ),
            ({"router": keras_moe.SwitchRouter()}, "`TopKRouter`", "'SwitchRouter'"),
            ({"gated": False}, "gated", "'gated': False"),
            ({"activation": "tanh"}, "silu.*gelu.*relu", "'activation': 'tanh'"),
            ({"tie_embeddings": True}, "outputs", "'tie_embeddings': True"),
            ({"router": keras_moe.TopKRouter(2, normalize=False)}, "Mixtral", "'normalize': False"),
            ({"router": keras_moe.TopKRouter(1)}, "Mixtral", "'k': 1,"),
            ({"normalize_queries": True, "key_dim": 4}, "OLMoE", "'key_dim': 4"),
        ],
    )
    def test_is_refused_and_nothing_written(self, options, allowed, received, tmp_path):
        backbone = zoo.DecoderBackbone(**(self.TINY | options))
        with pytest.raises(ValueError, match=f"^[^{{]*{allowed}.*{received}"):
            save_transformers(zoo.CausalLM(backbone), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 8}, "`sliding_window`.*131072.*sliding_window=8"),
        (
            {"sliding_window": 63, "max_position_embeddings": 64},
            "`sliding_window`.*64.*sliding_window=63",
        ),
        ({"sliding_window": 8.5}, r"`sliding_window`.*sliding_window=8\.5"),
        ({"attention_bias": True}, "`attention_bias`.*attention_bias=True"),
        ({"attention_dropout": 1.5}, r"`attention_dropout`.*attention_dropout=1\.5"),
        ({"attention_dropout": "0.1"}, "`attention_dropout`.*attention_dropout='0.1'"),
        ({"clip_qkv": 8.0}, "`clip_qkv`.*clip_qkv=8.0"),
        ({"rope_scaling": {"type": "dynamic"}}, "`rope_scaling`.*rope_scaling=.*'dynamic'"),
        ({"rope_scaling": 2.0}, r"`rope_scaling`.*rope_scaling=2\.0"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`.*quantization_config=.*4"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "`rope_type`.*'default'.*'yarn'"),
        ({"rope_parameters": {"type": "yarn"}}, "`rope_type`.*'default'.*'yarn'"),
        ({"num_experts_per_tok": 1}, "`num_experts_per_tok`.*2.*1$"),
        ({"num_experts_per_tok": 5}, "`num_experts_per_tok`.*4.*num_experts_per_tok=5"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers`.*num_hidden_layers=1000000000"),
        ({"num_local_experts": 10**9}, "`num_local_experts`.*num_local_experts=1000000000"),
        ({"vocab_size": 10**9}, r"'model\.embed_tokens\.weight'.*\(1000000000, 16\)"),
        ({"hidden_size": 10**30}, "`hidden_size`.*hidden_size=10+$"),
        ({"num_attention_heads": 10**6}, r"q_proj\.weight'.*\(6000000, 16\)"),
        ({"num_attention_heads": 0}, "`num_attention_heads`.*num_attention_heads=0"),
        ({"hidden_size": "16"}, "`hidden_size`.*hidden_size='16'"),
        ({"rms_norm_eps": None, "vocab_size": None}, "`vocab_size`.*vocab_size=None"),
        ({"rope_parameters": {"rope_theta": 0}}, "`rope_theta`.*rope_theta=0"),
        ({"rope_parameters": [1]}, r"`rope_parameters`.*rope_parameters=\[1\]"),
        ({"tie_word_embeddings": "no"}, "`tie_word_embeddings`.*tie_word_embeddings='no'"),
        ({"model_type": []}, r"mixtral.*olmoe.*model_type=\[\]"),
        ({"hidden_act": "tanh"}, "`hidden_act`.*silu.*gelu.*relu.*hidden_act='tanh'"),
        ({"hidden_act": ["silu"]}, r"`hidden_act`.*silu.*hidden_act=\['silu'\]"),
        ({"num_local_experts": 5}, r"'.*experts\.4\.w1\.weight'.*\b5\b"),
    ],
)
def test_configs_that_do_not_fit(options, message, tmp_path):
    theirs("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(ValueError, match=message):
        load_transformers(tmp_path)


def test_a_head_of_odd_width(tmp_path):
    """Given, or what follows from the other sizes."""
    config = transformers.MixtralConfig(**FAMILIES["mixtral"][1]).to_dict()
    for sizes in ({"head_dim": 5}, {"head_dim": None, "hidden_size": 12}):
        (tmp_path / "config.json").write_text(json.dumps(config | sizes))
        with pytest.raises(ValueError, match="`head_dim`.*even.*head_dim=[53]"):
            load_transformers(tmp_path, load_weights=False)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_settings_that_change_nothing_in_inference(family, tmp_path):
    """They are written again, as training there has them."""
    harmless = {"attention_dropout": 0.1, "max_position_embeddings": 64}
    if family == "mixtral":
        harmless["sliding_window"] = 64
    model = theirs(family, **harmless)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    close(loaded.predict(INPUTS, verbose=0)[VALID], run_theirs(model).logits[torch.tensor(VALID)])
    save_transformers(loaded, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: config[name] for name in harmless} == harmless


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
        ("olmoe", {"num_experts": 1, "num_experts_per_tok": 1}),
        ("olmoe, normalized", {"num_experts": 1, "num_experts_per_tok": 1}),
    ],
)
def test_one_expert_there_and_back(family, options, tmp_path):
    model = theirs(family, **options)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_transformers(tmp_path / "theirs")
    expected = run_theirs(model).logits[torch.tensor(VALID)]
    close(loaded.predict(INPUTS, verbose=0)[VALID], expected)
    save_transformers(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    close(run_theirs(again).logits[torch.tensor(VALID)].numpy(), expected)


class TestFused:
    """One tensor for the kernels of all experts of a block, as transformers 5 has them itself."""

    @pytest.mark.parametrize("family", ["mixtral", "olmoe"])
    @pytest.mark.parametrize("experts", [1, 3])
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
    def test_it_is_read(self, family, experts, safe, tmp_path):
        name = "num_experts" if family == "olmoe" else "num_local_experts"
        model = theirs(family, **{name: experts, "num_experts_per_tok": min(2, experts)})
        model.save_pretrained(tmp_path, save_original_format=False, max_shard_size="10KB")
        if not safe:
            for path in tmp_path.glob("*.safetensors*"):
                path.unlink()
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        loaded = load_transformers(tmp_path)
        expected = run_theirs(model).logits[torch.tensor(VALID)]
        close(loaded.predict(INPUTS, verbose=0)[VALID], expected)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_local_experts": 5}, r"experts\.gate_up_proj'.*\(4, 48, 16\).*\(5, 48, 16\)"),
            ({"intermediate_size": 12}, r"experts\.gate_up_proj'.*\(4, 24, 16\)"),
            ({"num_local_experts": 10**9}, r"experts\.gate_up_proj'.*\(1000000000, 48, 16\)"),
        ],
    )
    def test_of_another_shape(self, options, message, tmp_path):
        theirs("mixtral").save_pretrained(tmp_path, save_original_format=False)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
        with pytest.raises(ValueError, match=message):
            load_transformers(tmp_path)


def test_rope_theta_as_earlier_versions_wrote_it(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    cases = (({"rope_theta": 500.0}, 500), ({}, 1e6), ({"rope_parameters": {}}, 1e6))
    for given, wavelength in cases:
        path.write_text(json.dumps({**config, **given}))
        assert load_transformers(tmp_path).backbone.max_wavelength == wavelength


def test_logits_of_their_own_where_the_config_says_tied(tmp_path):
    """transformers then looks whether the weights are the same, and so must we."""
    model = theirs("mixtral, tied")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_transformers(tmp_path).backbone.tie_embeddings
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_transformers(tmp_path)
    assert not loaded.backbone.tie_embeddings
    expected = run_theirs(type(model).from_pretrained(tmp_path).eval()).logits
    close(loaded.predict(INPUTS, verbose=0)[VALID], expected[torch.tensor(VALID)])


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_balancing_losses_agree_at_balance(family, tmp_path):
    """With a router that is next to nothing all probabilities are 1/E, whoever is chosen.

    Theirs is then the coefficient times k = 3, ours for each of the two layers its weight.
    """
    model = theirs(family, num_experts_per_tok=3, router_aux_loss_coef=0.03)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight *= 1e-6
    model.save_pretrained(tmp_path / "theirs")
    labels = {"labels": torch.tensor(IDS)}
    with_router = run_theirs(model, **labels, output_router_logits=True).loss
    expected = float(with_router - run_theirs(model, **labels).loss)
    loaded = load_transformers(tmp_path / "theirs")
    loaded(INPUTS)
    assert float(sum(loaded.losses)) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(3 * 0.03, rel=1e-4)
    save_transformers(loaded, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["router_aux_loss_coef"] == pytest.approx(0.03, rel=1e-12)


def test_the_tables_are_compared_only_where_the_config_ties_them(tmp_path, monkeypatch):
    theirs("mixtral").save_pretrained(tmp_path)
    monkeypatch.delattr("zoo.conversion.tensors.Tensors.are_equal_or_one")
    assert not load_transformers(tmp_path).backbone.tie_embeddings


def test_only_mixtral_has_jitter(tmp_path):
    """transformers' OLMoE knows no such entry."""
    for family, expected in (("mixtral", 0.1), ("olmoe", 0.0)):
        theirs(family, router_jitter_noise=0.1).save_pretrained(tmp_path / family)
        model = load_transformers(tmp_path / family, load_weights=False)
        assert model.backbone.blocks[0].feed_forward.router.jitter == expected
