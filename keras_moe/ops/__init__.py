"""What `keras.ops` lacks, or does slowly. Only this folder and `distribution` name a backend."""

from keras_moe.ops.arrays import adopt, empty, transposed
from keras_moe.ops.calls import call_by_row
from keras_moe.ops.gradients import with_gradient
from keras_moe.ops.noise import drop, dropout, normal, uniform
from keras_moe.ops.products import IMPLEMENTATIONS, expert_product, row_size
from keras_moe.ops.recorded import recorded
from keras_moe.ops.rows import (
    add_rows,
    argsort,
    count_entries,
    embedding_lookup,
    put_rows,
    sum_rows,
    take_entries,
    take_rows,
    top_k,
    write_entries,
)
from keras_moe.ops.sizes import as_number, largest, smallest
from keras_moe.ops.state import check_can_loop, keeps_statistics

__all__ = [
    "IMPLEMENTATIONS",
    "add_rows",
    "adopt",
    "argsort",
    "as_number",
    "call_by_row",
    "check_can_loop",
    "count_entries",
    "drop",
    "dropout",
    "empty",
    "expert_product",
    "keeps_statistics",
    "largest",
    "normal",
    "embedding_lookup",
    "put_rows",
    "recorded",
    "row_size",
    "smallest",
    "sum_rows",
    "take_entries",
    "take_rows",
    "top_k",
    "transposed",
    "uniform",
    "with_gradient",
    "write_entries",
]
