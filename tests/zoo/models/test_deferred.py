import keras
import numpy as np
import pytest
from keras import ops

import zoo
from tests.backend import numpy
from zoo.models.deferred import Deferred

TINY = {
    "vocabulary_size": 20,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "key_dim": 4,
    "intermediate_dim": 12,
}


def test_values_given_and_by_the_initializers():
    with Deferred() as deferred:
        model = zoo.dense_transformer("mini", **TINY)
    assert model.count_params() == zoo.dense_transformer("mini", **TINY).count_params()
    kernel = model.encoder_blocks[0].feed_forward.hidden.kernel
    scale = model.encoder_output_norm.scale
    deferred.initialize([(kernel, lambda: ops.full((8, 12), 7.0))])
    np.testing.assert_array_equal(numpy(kernel), np.full((8, 12), 7))
    np.testing.assert_array_equal(numpy(scale), np.ones(8))
    spread = numpy(model.token_embedding.embeddings).std()
    assert 0.7 < spread < 1.3  # its own initializer
    x = {name: np.ones((1, 3), "int32") for name in model.input}
    assert np.isfinite(model.predict(x, verbose=0)["decoder_sequence_output"]).all()


def test_no_value_is_made_by_what_comes_after():
    with Deferred():
        huge = keras.layers.Dense(10**7)
        huge.build((None, 10**7))  # 400 TB
    keras.layers.Dense(2)(keras.Input((3,)))
    with keras.StatelessScope():
        pass
    assert huge.count_params() == 10**14 + 10**7


def test_a_failure_leaves_nothing_behind():
    with pytest.raises(RuntimeError), Deferred():
        keras.layers.Dense(10**7).build((None, 10**7))
        raise RuntimeError
    with keras.StatelessScope():
        pass
