import keras
import numpy as np
import pytest

import zoo

TINY = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "key_dim": 4, "intermediate_dim": 16}


@pytest.fixture(scope="module")
def model():
    backbone = zoo.dense_transformer("mini", architecture="encoder", dropout=0.0, **TINY)
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 6)
    return zoo.EncoderMaskedLM(backbone, preprocessor)


@pytest.fixture
def x():
    token_ids = np.arange(10, 22, dtype="int32").reshape(2, 6)
    places = np.array([[0, 3, 5], [1, 2, 4]], "int32")
    return {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "mask_positions": places,
    }


def test_logits_are_of_the_places_asked_for(model, x):
    logits = model.predict(x, verbose=0)
    assert logits.shape == (2, 3, 8192)
    # The head is a function of what the encoder says of a place: other places, other order.
    turned = model.predict({**x, "mask_positions": x["mask_positions"][:, ::-1]}, verbose=0)
    np.testing.assert_allclose(turned, logits[:, ::-1], atol=1e-5)


def test_the_table_is_the_embeddings(model, x):
    names = [weight.path for weight in model.trainable_weights if 8192 in weight.shape]
    assert len(names) == 2  # the table, and a bias for each piece
    table = model.backbone.token_embedding.embeddings
    before = model.predict(x, verbose=0)
    old = keras.ops.convert_to_numpy(table)
    new = old.copy()
    new[4000] += np.arange(8)  # a piece that is not among the tokens
    table.assign(new)
    after = model.predict(x, verbose=0)
    table.assign(old)
    changed = np.abs(after - before).max(axis=(0, 1)) > 1e-6
    assert changed.nonzero()[0].tolist() == [4000]


def test_fit_takes_tokens_with_a_tokenizer_at_hand(model, x):
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    labels = np.array([[10, 13, 15], [17, 18, 20]], "int32")
    (loss,) = model.fit(x, labels, batch_size=2, verbose=0).history["loss"]
    assert np.isfinite(loss)


def test_another_backbone_is_refused():
    decoder = zoo.dense_transformer("mini", architecture="decoder", **TINY)
    message = "`backbone`.*`EncoderMaskedLM`.*`EncoderBackbone`.* DecoderBackbone"
    with pytest.raises(ValueError, match=message):
        zoo.EncoderMaskedLM(decoder)


def test_a_tokenizer_of_more_pieces_than_rows_is_refused():
    backbone = zoo.dense_transformer("mini", architecture="encoder", vocabulary_size=7999, **TINY)
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 6)
    with pytest.raises(ValueError, match="`preprocessor`.* 7999 .*8000"):
        zoo.EncoderMaskedLM(backbone, preprocessor)
