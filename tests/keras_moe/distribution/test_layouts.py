"""Layouts as pure functions of paths and shapes; no mesh is made."""

import pytest

from keras_moe.distribution.layouts import bank_axes, expert_axes, moment_axes, other_axes, prefix

SIZES = {"data": 4, "expert": 2, "model": 3}


@pytest.mark.parametrize(
    "name, axes",
    [
        ("kernel_in", ("expert", None, "model")),
        ("kernel_gate", ("expert", None, "model")),
        ("bias_in", ("expert", "model")),
        ("kernel_out", ("expert", "model", None)),
        ("bias_out", ("expert", None)),
        ("kernel", ("expert", "model", None)),
        ("anything", ("expert",)),
    ],
)
def test_expert_weight_is_split_by_experts_and_hidden_units(name, axes):
    assert expert_axes(name) == axes


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        ("moe/experts/kernel_in", (8, 5, 6), ("expert", None, "model")),
        ("moe/experts/bias_out", (8, 5), ("expert", None)),
        ("kernel_out", (8, 6, 5), ("expert", "model", None)),
        ("moe/experts/scale", (8, 5, 6), ("expert", None, None)),
        ("moe/experts/temperature", (8,), ("expert",)),
    ],
)
def test_bank_axes_have_one_entry_per_dimension(path, shape, axes):
    assert bank_axes(path, shape, SIZES) == axes


@pytest.mark.parametrize(
    "path, shape, received",
    [
        ("moe/kernel_in", (7, 5, 6), r"2 devices.*'moe/kernel_in'.*\(7, 5, 6\)"),  # 7 experts by 2
        ("moe/kernel_in", (8, 5, 7), r"3 devices.*'moe/kernel_in'.*\(8, 5, 7\)"),  # 7 units by 3
    ],
)
def test_uneven_bank_raises(path, shape, received):
    with pytest.raises(ValueError, match=received):
        bank_axes(path, shape, SIZES)


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        ("block_1/attention/query/kernel", (16, 8), (None, "model")),
        ("attention/key/kernel", (16, 2, 8), (None, "model", None)),
        ("attention/value/bias", (2, 8), ("model", None)),
        ("block_1/attention/output/kernel", (8, 16), ("model", None)),
        ("self_attention/attention_output/kernel", (2, 8, 16), ("model", None, None)),
        ("block_2/feed_forward/hidden/kernel", (16, 32), (None, "model")),
        ("block_2/feed_forward/gate/kernel", (16, 32), (None, "model")),
        ("block_2/feed_forward/output/kernel", (32, 16), ("model", None)),
        ("moe/shared/kernel_in", (1, 16, 32), (None, None, "model")),
        ("moe/shared/kernel_gate", (1, 16, 32), (None, None, "model")),
        ("moe/shared/kernel_out", (1, 32, 16), (None, "model", None)),
    ],
)
def test_hidden_units_of_other_layers_are_split_by_model(path, shape, axes):
    assert other_axes(path, shape, 2) == axes


@pytest.mark.parametrize(
    "path, shape",
    [
        ("attention/query/kernel", (16, 9)),  # 9 columns by 2 devices
        ("attention/output/bias", (16,)),
        ("token_embedding/embeddings", (40, 16)),
        ("a_feed_forward/hidden/kernel", (16, 32)),  # a longer name
        ("attention/query/kernel/more", (16, 8)),
        ("adam/block_1_attention_query_kernel_momentum", (16, 8)),
        ("scalar", ()),
    ],
)
def test_everything_else_is_replicated(path, shape):
    assert other_axes(path, shape, 2) == (None,) * len(shape)


def test_prefix_begins_the_name_that_keras_gives_a_moment():
    assert prefix("block_1/moe/experts/kernel_in") == "block_1_moe_experts_kernel_in_"


WEIGHTS = {
    "moe_kernel_": ((8, 6, 5), ("expert", "model", None)),
    "moe_kernel_in_": ((8, 5, 6), ("expert", None, "model")),
    "dense_kernel_": ((8, 8), (None, "model")),
}


@pytest.mark.parametrize(
    "name, shape, axes",
    [
        ("moe_kernel_in_momentum", (8, 5, 6), ("expert", None, "model")),  # the longer prefix
        ("moe_kernel_momentum", (8, 6, 5), ("expert", "model", None)),
        ("dense_kernel_velocity", (8, 8), (None, "model")),
        # Adafactor's factors: the sums of an expert's rows, or columns, stay with the expert.
        ("moe_kernel_in_rows", (8, 5), ("expert", None)),
        ("moe_kernel_in_columns", (8, 6), ("expert", None)),
        ("moe_kernel_in_placeholder", (1,), (None,)),
        ("dense_kernel_rows", (8,), (None,)),  # 8 rows, and no experts
        ("learning_rate", (), None),
        ("other_moe_kernel_in_momentum", (8, 5, 6), None),
    ],
)
def test_moment_lies_where_its_weight_lies(name, shape, axes):
    assert moment_axes(name, shape, WEIGHTS) == axes
