"""Mixture-of-experts Transformers: builders, tasks and checkpoints, on top of `keras_moe`.

Names are imported when they are first used, so that `python -m zoo --backend jax` can choose the
backend before Keras is loaded.
"""

import importlib

_HOME = {
    "AdaptiveMixture": "zoo.models.adaptive_mixture",
    "CausalLM": "zoo.models.decoder",
    "CausalLMPreprocessor": "zoo.models.decoder",
    "DecoderBackbone": "zoo.models.decoder",
    "EncoderBackbone": "zoo.models.encoder",
    "EncoderDecoderBackbone": "zoo.models.encoder_decoder",
    "EncoderMaskedLM": "zoo.models.masked_lm",
    "EncoderTextClassifier": "zoo.models.encoder",
    "EncoderTextClassifierPreprocessor": "zoo.models.encoder",
    "InverseSquareRoot": "zoo.schedules",
    "LstmBackbone": "zoo.models.moe_lstm",
    "LstmCausalLM": "zoo.models.moe_lstm",
    "LstmCausalLMPreprocessor": "zoo.models.moe_lstm",
    "Seq2SeqLM": "zoo.models.encoder_decoder",
    "Seq2SeqLMPreprocessor": "zoo.models.encoder_decoder",
    "ZooTokenizer": "zoo.tokenizer",
    "adaptive_mixture": "zoo.models.adaptive_mixture",
    "default_tokenizer": "zoo.tokenizer",
    "dense_transformer": "zoo.models.builders",
    "expert_choice_transformer": "zoo.models.builders",
    "figures": "zoo.models.figures",
    "hash_transformer": "zoo.models.builders",
    "save_transformers": "zoo.conversion",
    "switch_transformer": "zoo.models.builders",
    "t5_tokenizer": "zoo.tokenizer",
    "compare": "zoo.finetuning.compare",
    "evaluate": "zoo.finetuning.evaluate",
    "finetune": "zoo.finetuning.run",
    "finetune_suite": "zoo.finetuning.suite",
    "from_preset": "zoo.presets",
    "list_presets": "zoo.catalogue",
    "model_card": "zoo.presets",
    "save_preset": "zoo.presets",
    "upload": "zoo.hub",
    "load_transformers": "zoo.conversion",
    "moe_lstm": "zoo.models.moe_lstm",
    "pretrain": "zoo.pretraining.run",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return __all__
