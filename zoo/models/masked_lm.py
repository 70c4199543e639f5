"""An encoder that guesses the tokens that were hidden from it, to be pretrained."""

import keras
import keras_hub

from zoo.models.blocks import check_parts
from zoo.models.encoder import EncoderBackbone, EncoderTextClassifierPreprocessor


@keras.saving.register_keras_serializable(package="zoo")
class EncoderMaskedLM(keras_hub.models.Task):
    """Logits of the tokens at some places of a text, by the table that embeds tokens.

    BERT's head (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): a dense layer, a norm, and
    the embedding table the other way round, with a bias. It computes at the places asked for alone.

    Inputs are a dictionary of `token_ids` and `padding_mask`, `[batch, length]`, and
    `mask_positions`, `[batch, guesses]`.

    Args:
        backbone: an `EncoderBackbone`.
        preprocessor: the `EncoderTextClassifierPreprocessor` of classifiers that are made of it,
            kept with it; inputs here are tokens.
        name: of the model.
        trainable: whether training changes the weights.

    Returns:
        When called: `[batch, guesses, vocabulary_size]` logits.
    """

    backbone_cls = EncoderBackbone
    preprocessor_cls = EncoderTextClassifierPreprocessor

    def __init__(self, backbone, preprocessor=None, name=None, trainable=True):
        check_parts(EncoderMaskedLM, backbone, preprocessor)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        head = keras_hub.layers.MaskedLMHead(
            token_embedding=backbone.token_embedding,
            intermediate_activation="gelu",
            kernel_initializer=keras.initializers.VarianceScaling(),
            dtype=backbone.dtype_policy,
            name="masked_lm_head",
        )

        # === Functional model ===
        places = keras.Input((None,), dtype="int32", name="mask_positions")
        inputs = {**backbone.input, "mask_positions": places}
        outputs = head(backbone(backbone.input), mask_positions=places)
        super().__init__(inputs=inputs, outputs=outputs, name=name, trainable=trainable)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """Leaves tokens as they are: which of them to hide, an objective says, not a text."""
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
