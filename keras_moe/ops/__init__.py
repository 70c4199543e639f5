"""What `keras.ops` lacks, or does slowly. Only this folder and `distribution` name a backend."""

from keras_moe.ops.arrays import adopt, empty, transposed
from keras_moe.ops.calls import call_by_row
from keras_moe.ops.gradients import with_gradient
from keras_moe.ops.noise import drop, dropout, normal, uniform
from keras_moe.ops.products import IMPLEMENTATIONS, expert_product, row_size
from keras_moe.ops.recorded import recorded
from keras_moe.ops.rows import add_rows, embedding_lookup, put_rows, sum_rows, take_rows, top_k

__all__ = [
    "IMPLEMENTATIONS",
    "add_rows",
    "adopt",
    "call_by_row",
    "drop",
    "dropout",
    "empty",
    "expert_product",
    "normal",
    "embedding_lookup",
    "put_rows",
    "recorded",
    "row_size",
    "sum_rows",
    "take_rows",
    "top_k",
    "transposed",
    "uniform",
    "with_gradient",
]
