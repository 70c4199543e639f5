"""Products of rows of slots with the kernels of their experts.

R rows of slots, C slots per row, D width, E experts, F hidden.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_moe.ops.gradients import with_gradient
from keras_moe.ops.rows import argsort, count_entries
from keras_moe.ops.sizes import largest, smallest

IMPLEMENTATIONS = ("auto", "batched", "loop", "grouped")
# Multiplications of every slot by every kernel that JAX has done on a CPU before it has compiled a
# loop, and whose masked copies of the slots are not large.
FEW = 2**28


def expert_product(x_RCD, kernel_EDF, row_expert=None, implementation="auto", before=None):
    """Multiplies every row of slots by the kernel of its expert.

    The implementations differ in speed alone:

    * `"batched"`: one batched product; one row per expert only, since a kernel would have to be
      copied for every row.
    * `"loop"`: expert after expert. An expert without rows costs nothing, its kernel is not read.
    * `"grouped"`: the backend's own product of sorted rows, `torch.nn.functional.grouped_mm` or
      `jax.lax.ragged_dot`; TensorFlow has none. Made for accelerators: on a CPU PyTorch's is a
      loop and JAX's multiplies every row by every kernel, so that one which is not finite spoils
      all rows.
    * `"auto"`: the fastest on this backend and kind of device, see `benchmarks/README.md`.

    Args:
        x_RCD: `[rows, slots, in]` tensor; with `before` a tuple of such tensors.
        kernel_EDF: `[experts, in, out]` tensor or variable.
        row_expert: `[rows]` integers, the expert of each row, in ascending order; a row of number
            `experts` is nobody's, and what comes out of it is finite but not defined. `None` when
            row `e` is expert `e`.
        implementation: one of `IMPLEMENTATIONS`.
        before: function from tensors like `x_RCD` to one, entry by entry, which makes the product's
            input; an activation. XLA does not join it with a loop: done row by row inside, what it
            returns is never held as a whole, nor its gradient.

    Returns:
        `[rows, slots, out]` tensor.

    Raises:
        ValueError: if there is no such implementation, or none on this backend or for such rows.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be one of {', '.join(IMPLEMENTATIONS)}. "
            f"Received: implementation={implementation!r}"
        )
    kernel_EDF = ops.convert_to_tensor(kernel_EDF)
    if implementation == "auto":
        rows, slots, _ = (x_RCD if before is None else x_RCD[0]).shape
        if row_expert is None:
            implementation = _fastest_of_one_each(slots)
        elif _is_plain_jax_call() and _on_cpu("jax") and rows * slots * kernel_EDF.size < FEW:
            implementation = "masked"
        else:
            implementation = _fastest_as_needed(kernel_EDF)
    in_loop = implementation == "loop" and keras.backend.backend() == "jax"
    if before is not None and not in_loop:
        x_RCD = before(*x_RCD)
    if implementation == "batched":
        if row_expert is not None:
            raise ValueError(
                "`implementation='batched'` must have one row of slots per expert, as with a "
                "capacity. Received: as many rows as an expert needs; use 'auto' or 'loop'"
            )
        return ops.matmul(x_RCD, kernel_EDF)
    if row_expert is None:
        row_expert = np.arange(kernel_EDF.shape[0], dtype="int32")
    row_expert = ops.convert_to_tensor(row_expert)
    if in_loop:
        xs = (x_RCD,) if before is None else x_RCD
        return _jax_loop(xs, kernel_EDF, row_expert, before or (lambda x: x))
    return (_loop if implementation == "loop" else _grouped)(x_RCD, kernel_EDF, row_expert)


def row_size(assignments, num_experts):
    """Slots per row that suit the products, where an expert has as many rows as it needs.

    Long rows make better products, short rows leave fewer slots empty at an expert's end.

    Args:
        assignments: integer; a scalar tensor where it is not known before run time.
        num_experts: integer.

    Returns:
        Integer, or a scalar tensor where `assignments` is one.
    """
    if _fastest_as_needed() == "grouped":
        return 8  # rows that begin at multiples of 16 bytes, whichever way they are read
    if not _compiles():
        return 1  # the loop joins an expert's rows
    if not isinstance(assignments, int) and not ops.is_tensor(assignments):
        return 16  # JAX exports with a free batch size, and wants to know the rows' length
    # A quarter of a fair share leaves an eighth of the slots empty; under 16 they are slow.
    share = assignments // num_experts
    return smallest(largest(share // 4, smallest(largest(share, 1), 16)), 128)


def _fastest_of_one_each(slots):
    """What "auto" stands for where every expert has one row; `python -m benchmarks.layer` tells."""
    backend = keras.backend.backend()
    if backend == "torch" or not _on_cpu(backend) or _is_plain_jax_call():
        return "batched"
    # On a CPU XLA's batched products are slow where rows are short.
    return "loop" if _compiles() and isinstance(slots, int) and slots < 128 else "batched"


def _fastest_as_needed(kernel_EDF=None):
    """What "auto" stands for where an expert has the rows it needs; for most kernels if `None`."""
    backend = keras.backend.backend()
    if backend == "tensorflow" or _on_cpu(backend):
        return "loop"
    if backend == "jax" or kernel_EDF is None:
        return "grouped"
    from keras_moe.ops.torch_only import is_aligned

    return "grouped" if is_aligned(kernel_EDF) else "loop"


def _on_cpu(backend):
    if backend == "jax":
        import jax

        return jax.default_backend() == "cpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_physical_devices("GPU")
    import torch

    return not torch.cuda.is_available()


def _compiles():
    """Whether this is for XLA, so that shapes must not depend on the routing."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util

        return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    return backend == "jax"


def _is_plain_jax_call():
    """Whether JAX is not compiling all of this as a whole; it then compiles loops at every call."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return not isinstance(jax.numpy.zeros(()), jax.core.Tracer)


def _grouped(x_RCD, kernel_EDF, row_expert):
    """The products by the backend's own operation."""
    if keras.backend.backend() == "tensorflow":
        raise ValueError(
            "`implementation='grouped'` must be used on JAX or PyTorch; TensorFlow has no grouped "
            "product. Received: implementation='grouped'; use 'auto' or 'loop'"
        )
    _, by_rows = _grouped_products()

    def backward(upstream_RCF, x_RCD, kernel_EDF, row_expert):
        spans = _grouped_spans(x_RCD, kernel_EDF, row_expert)
        kernel_EFD = ops.transpose(kernel_EDF, (0, 2, 1))
        return [
            lambda: _grouped_forward(upstream_RCF, kernel_EFD, row_expert),
            lambda: by_rows(_flat(x_RCD), _flat(upstream_RCF), *spans),
            None,
        ]

    return with_gradient(_grouped_forward, backward, _plain)(x_RCD, kernel_EDF, row_expert)


def _grouped_forward(x_RCD, kernel_EDF, row_expert):
    by_kernels, _ = _grouped_products()
    spans = _grouped_spans(x_RCD, kernel_EDF, row_expert)
    y_MF = by_kernels(_flat(x_RCD), kernel_EDF, *spans)
    return ops.reshape(y_MF, (*x_RCD.shape[:2], kernel_EDF.shape[2]))


def _grouped_products():
    """The backend's two grouped products: rows times kernels, and rows times rows."""
    if keras.backend.backend() == "jax":
        return _jax_grouped_kernels, _jax_grouped_rows
    from keras_moe.ops.torch_only import grouped_kernels, grouped_rows

    return grouped_kernels, grouped_rows


def _grouped_spans(x_RCD, kernel_EDF, row_expert):
    """The first slot of each expert and the slot after its last."""
    rows, slots, _ = x_RCD.shape
    start_E, end_E = _spans(row_expert, kernel_EDF.shape[0])
    # The last expert also takes the rows that are nobody's, so that all of them are defined.
    end_E = ops.concatenate([end_E[:-1], ops.full((1,), rows, dtype="int32")])
    return start_E * slots, end_E * slots


def _flat(x_RCD):
    rows, slots, dim = x_RCD.shape
    return ops.reshape(x_RCD, (rows * slots, dim))


def _jax_grouped_kernels(x_MD, kernel_EDF, start_E, end_E):
    from jax import lax

    return lax.ragged_dot(x_MD, kernel_EDF, end_E - start_E)


def _jax_grouped_rows(x_MD, y_MF, start_E, end_E):
    from jax import lax

    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return lax.ragged_dot_general(x_MD, y_MF, end_E - start_E, numbers)


def _loop(x_RCD, kernel_EDF, row_expert):
    """The products one after another, with a gradient that is such a loop too."""
    if keras.backend.backend() == "torch":
        from keras_moe.ops.torch_only import times_kernel, times_rows
    elif _compiles():
        times_kernel, times_rows = _xla_times_kernel, _xla_times_rows
    else:
        times_kernel, times_rows = _tensorflow_times_kernel, _tensorflow_times_rows

    def forward(x_RCD, kernel_EDF, row_expert):
        return times_kernel(x_RCD, kernel_EDF, _spans(row_expert, kernel_EDF.shape[0]))

    def backward(upstream_RCF, x_RCD, kernel_EDF, row_expert):
        spans = _spans(row_expert, kernel_EDF.shape[0])
        return [
            lambda: times_kernel(upstream_RCF, kernel_EDF, spans, transposed=True),
            lambda: times_rows(x_RCD, upstream_RCF, spans),
            None,
        ]

    return with_gradient(forward, backward, _plain)(x_RCD, kernel_EDF, row_expert)


def _plain(x_RCD, kernel_EDF, row_expert):
    """The products from operations that every transformation knows, at a higher price."""
    if keras.backend.backend() == "torch":
        from keras_moe.ops.torch_only import exports_grouped_products

        if exports_grouped_products(x_RCD, kernel_EDF):
            return _grouped_forward(x_RCD, kernel_EDF, row_expert)
    row_expert = ops.reshape(row_expert, (-1, 1, 1))
    products = [
        ops.matmul(ops.where(row_expert == expert, x_RCD, 0.0), kernel_EDF[expert])
        for expert in range(kernel_EDF.shape[0])
    ]
    return sum(products[1:], products[0])


def _spans(row_expert, num_experts):
    """The first row of each expert and the row after its last, `[experts]` int32 each."""
    count_E = count_entries(ops.cast(row_expert, "int32"), num_experts + 1)[:-1]
    end_E = ops.cast(ops.cumsum(count_E), "int32")
    return end_E - count_E, end_E


def _busy(spans):
    """The experts that have rows, first, and how many they are."""
    start_E, end_E = spans
    idle_E = ops.cast(start_E == end_E, "int32")
    return argsort(idle_E), ops.sum(1 - idle_E)


def _jax_loop(xs, kernel_EDF, row_expert, before):
    """`_loop` on JAX, of what `before` makes of the rows of `xs`."""
    from jax import lax, vjp

    def of_row(row, xs):
        return [x_RCD[row] for x_RCD in xs]

    def forward(*inputs):
        *xs, kernel_EDF, row_expert = inputs

        def product(row, kernel_DF):
            return (before(*of_row(row, xs)) @ kernel_DF,)

        spans = _spans(row_expert, kernel_EDF.shape[0])
        y_RCF = ops.zeros((*xs[0].shape[:2], kernel_EDF.shape[2]), xs[0].dtype)
        return _jax_rows(product, kernel_EDF, spans, [y_RCF])[0]

    def backward(upstream_RCF, *inputs):
        *xs, kernel_EDF, row_expert = inputs
        spans = _spans(row_expert, kernel_EDF.shape[0])

        def of_inputs(row, kernel_DF):
            return vjp(before, *of_row(row, xs))[1](upstream_RCF[row] @ kernel_DF.T)

        def of_kernel(row):
            contract = (((0,), (0,)), ((), ()))
            x_CD, y_CF = before(*of_row(row, xs)), upstream_RCF[row]
            return lax.dot_general(x_CD, y_CF, contract, preferred_element_type="float32")

        @functools.cache
        def all_of_inputs():
            return _jax_rows(of_inputs, kernel_EDF, spans, [ops.zeros_like(x) for x in xs])

        gradients = [lambda i=i: all_of_inputs()[i] for i in range(len(xs))]
        return [*gradients, lambda: _jax_sums(of_kernel, kernel_EDF, spans), None]

    def plain(*inputs):
        *xs, kernel_EDF, row_expert = inputs
        return _plain(before(*xs), kernel_EDF, row_expert)

    return with_gradient(forward, backward, plain)(*xs, kernel_EDF, row_expert)


def _jax_rows(of_row, kernel_EDF, spans, results):
    """Writes what `of_row` makes of every row and its expert's kernel into the `results`."""
    from jax import lax

    start_E, end_E = spans
    order_E, busy = _busy(spans)

    def of_expert(i, results):
        expert = order_E[i]
        kernel_DF = kernel_EDF[expert]

        def write(row, results):
            parts = of_row(row, kernel_DF)
            return [
                lax.dynamic_update_index_in_dim(result, part.astype(result.dtype), row, 0)
                for result, part in zip(results, parts, strict=True)
            ]

        return lax.fori_loop(start_E[expert], end_E[expert], write, results)

    return lax.fori_loop(0, busy, of_expert, results)


def _jax_sums(of_row, kernel_EDF, spans):
    """Sums what `of_row` makes of an expert's rows, float32, into a tensor like the kernels."""
    from jax import lax

    start_E, end_E = spans
    order_E, busy = _busy(spans)

    def of_expert(i, result_EDF):
        expert = order_E[i]
        first = start_E[expert]
        sum_DF = lax.fori_loop(
            first + 1, end_E[expert], lambda row, sum_DF: sum_DF + of_row(row), of_row(first)
        )
        return lax.dynamic_update_index_in_dim(
            result_EDF, sum_DF.astype(kernel_EDF.dtype), expert, 0
        )

    return lax.fori_loop(0, busy, of_expert, ops.zeros_like(kernel_EDF))


def _xla_times_kernel(x_RCD, kernel_EDF, spans, transposed=False):
    import tensorflow as tf

    start_E, end_E = spans
    order_E, busy = _busy(spans)
    rows, slots, _ = ops.shape(x_RCD)

    def of_expert(i, y_RCF):
        expert = _item(order_E, i)
        kernel_DF = _item(kernel_EDF, expert)

        def of_row(row, y_RCF):
            y_CF = tf.matmul(_item(x_RCD, row), kernel_DF, transpose_b=transposed)
            return row + 1, tf.raw_ops.TensorListSetItem(input_handle=y_RCF, index=row, item=y_CF)

        _, y_RCF = tf.while_loop(
            lambda row, _: row < _item(end_E, expert), of_row, (_item(start_E, expert), y_RCF)
        )
        return i + 1, y_RCF

    shape_CF = (slots, kernel_EDF.shape[1 if transposed else 2])
    return _xla_list(of_expert, busy, rows, shape_CF, x_RCD.dtype)


def _xla_times_rows(x_RCD, y_RCF, spans):
    import tensorflow as tf

    start_E, end_E = spans
    order_E, busy = _busy(spans)

    def of_row(row):
        return tf.cast(tf.matmul(_item(x_RCD, row), _item(y_RCF, row), transpose_a=True), "float32")

    def of_expert(i, result_EDF):
        expert = _item(order_E, i)
        first = _item(start_E, expert)
        _, sum_DF = tf.while_loop(
            lambda row, _: row < _item(end_E, expert),
            lambda row, sum_DF: (row + 1, sum_DF + of_row(row)),
            (first + 1, of_row(first)),
        )
        return i + 1, tf.raw_ops.TensorListSetItem(
            input_handle=result_EDF, index=expert, item=tf.cast(sum_DF, x_RCD.dtype)
        )

    shape_DF = (x_RCD.shape[2], y_RCF.shape[2])
    return _xla_list(of_expert, busy, start_E.shape[0], shape_DF, x_RCD.dtype)


def _item(x, index):
    """`x[index]`, which XLA would want to know when it compiles, and compile anew at every step."""
    import tensorflow as tf

    return tf.gather(x, index)


def _xla_list(fill, count, length, shape, dtype):
    """Stacks what `fill` puts into a list of zeros; a tensor would be copied at every step."""
    import tensorflow as tf

    items = tf.raw_ops.TensorListReserve(
        element_shape=shape, num_elements=length, element_dtype=dtype
    )
    _, items = tf.while_loop(lambda i, _: i < count, fill, (0, items))
    return tf.raw_ops.TensorListStack(input_handle=items, element_shape=shape, element_dtype=dtype)


def _tensorflow_times_kernel(x_RCD, kernel_EDF, spans, transposed=False):
    import tensorflow as tf

    start_E, end_E = spans
    order_E, busy = _busy(spans)
    rows, slots, dim = ops.shape(x_RCD)
    x_MD = tf.reshape(x_RCD, (-1, dim))

    def of_expert(i, y_MF):
        expert = order_E[i]
        start, end = start_E[expert] * slots, end_E[expert] * slots
        part_MF = tf.matmul(x_MD[start:end], kernel_EDF[expert], transpose_b=transposed)
        return i + 1, tf.raw_ops.InplaceUpdate(x=y_MF, i=tf.range(start, end), v=part_MF)

    hidden = kernel_EDF.shape[1 if transposed else 2]
    y_MF = _tensorflow_zeros((rows * slots, hidden), x_RCD.dtype)
    _, y_MF = tf.while_loop(lambda i, _: i < busy, of_expert, (0, y_MF))
    return tf.reshape(y_MF, (rows, slots, hidden))


def _tensorflow_times_rows(x_RCD, y_RCF, spans):
    import tensorflow as tf

    start_E, end_E = spans
    order_E, busy = _busy(spans)
    dim, hidden = x_RCD.shape[2], y_RCF.shape[2]

    def of_expert(i, result_EDF):
        expert = order_E[i]
        span = slice(start_E[expert], end_E[expert])
        x_MD, y_MF = tf.reshape(x_RCD[span], (-1, dim)), tf.reshape(y_RCF[span], (-1, hidden))
        of_rows_1DF = tf.matmul(x_MD, y_MF, transpose_a=True)[None]
        return i + 1, tf.raw_ops.InplaceUpdate(x=result_EDF, i=expert[None], v=of_rows_1DF)

    result_EDF = _tensorflow_zeros((start_E.shape[0], dim, hidden), x_RCD.dtype)
    _, result_EDF = tf.while_loop(lambda i, _: i < busy, of_expert, (0, result_EDF))
    return result_EDF


def _tensorflow_zeros(shape, dtype):
    """Zeros that may be written into: `tf.zeros` may be a constant of the graph, the same always.

    What is written in place is held once; a `TensorArray` holds its parts and then their whole.
    """
    import tensorflow as tf

    return tf.raw_ops.Empty(shape=shape, dtype=dtype, init=True)
