"""Small Mixtrals and OLMoEs that transformers makes."""

import numpy as np
import torch
import transformers

SHARED = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "mixtral": ("Mixtral", {**SHARED, "num_local_experts": 4, "head_dim": 6}),
    "mixtral, tied": (
        "Mixtral",
        {**SHARED, "num_local_experts": 4, "tie_word_embeddings": True},
    ),
    "olmoe": ("Olmoe", {**SHARED, "num_experts": 5}),
    "olmoe, normalized": ("Olmoe", {**SHARED, "num_experts": 5, "norm_topk_prob": True}),
}
rng = np.random.default_rng(0)
IDS = rng.integers(2, 40, (2, 11))
MASK = np.ones((2, 11), "int32")
MASK[1, 7:] = 0
INPUTS = {"token_ids": IDS, "padding_mask": MASK}
VALID = MASK.astype(bool)


def theirs(family, **others):
    """A model of transformers with weights large enough that its attention and routing matter."""
    name, options = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(options | others))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


def run_theirs(model, **options):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK),
            use_cache=False,
            **options,
        )


def close(ours, expected):
    np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
