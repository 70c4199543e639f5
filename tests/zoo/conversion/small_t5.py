"""Small T5s and Switch Transformers that transformers makes."""

import json

import numpy as np
import torch
import transformers
from keras import ops

SHARED = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 3,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
SWITCH = {
    **SHARED,
    "num_experts": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
}
FAMILIES = {
    "t5": ("T5", {**SHARED, "feed_forward_proj": "relu"}),
    "t5 1.1": (
        "T5",
        {**SHARED, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5 1.1, tied": (
        "T5",
        {**SHARED, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5", SHARED),
    "switch": ("SwitchTransformers", {**SWITCH, "expert_capacity": 64}),
    "switch that drops": ("SwitchTransformers", {**SWITCH, "expert_capacity": 2}),
}
rng = np.random.default_rng(0)
IDS = rng.integers(2, 40, (2, 21))
MASK = np.ones((2, 21), "int32")
MASK[1, 15:] = 0
LABELS = rng.integers(2, 40, (2, 7))
INPUTS = {
    "encoder_token_ids": IDS,
    "encoder_padding_mask": MASK,
    "decoder_token_ids": np.pad(LABELS[:, :-1], ((0, 0), (1, 0))),
    "decoder_padding_mask": np.ones((2, 7), "int32"),
}


def theirs(family, lively=False):
    """A model of transformers with weights large enough that its attention and routing matter.

    A lively one does not say the same token again and again, at the price of larger rounding.
    """
    name, options = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    if family in ("t5 1.1", "mt5"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.3 if lively else 0.15) * torch.randn(parameter.shape)
            if lively and name.startswith("decoder") and "norm" not in name:
                parameter *= 2
    return model


def run_theirs(model):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK),
            labels=torch.tensor(LABELS),
        )


def close(ours, expected):
    np.testing.assert_allclose(
        ops.convert_to_numpy(ours), expected.detach().numpy(), rtol=1e-4, atol=1e-4
    )


def pickled(model, folder, num_shards=2, without=("lm_head.weight",)):
    """A folder with shards of PyTorch's and their index, as earlier versions wrote it.

    The logits' weights, which are tied, are left out, or other names `without` which it shall be.
    """
    model.config.save_pretrained(folder)
    names = sorted(set(model.state_dict()) - set(without))
    weight_map = {}
    for number in range(num_shards):
        file = f"pytorch_model-{number + 1:05}-of-{num_shards:05}.bin"
        shard = {name: model.state_dict()[name].clone() for name in names[number::num_shards]}
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
