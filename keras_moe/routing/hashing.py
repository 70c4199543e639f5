"""The router that learns nothing: an expert for every token id. Letters as in `base.py`."""

import keras
import numpy as np
from keras import ops

from keras_moe.routing.base import layer_options
from keras_moe.routing.token_choice import TopKRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class HashRouter(TopKRouter):
    """Every token goes to the one expert that its id is hashed to, with weight 1.

    Hash layers (Roller et al. 2021, https://arxiv.org/abs/2106.04426), the baseline of Expert
    Choice's Table 4 (https://arxiv.org/abs/2202.09368), where the hash is the id modulo the number
    of experts. There is no weight to train, and no loss: how evenly the experts are used follows
    from how often the ids occur.

    The ids go through the layer: `MixtureOfExperts(experts, HashRouter())(inputs, token_ids=ids)`.

    Args:
        num_experts: integer; may be left to the `MixtureOfExperts` that takes the router.
        table: list of integers, the expert of each token id; ids past its end begin again at its
            start. `None`: `0, 1, ..., num_experts - 1`, so that the hash is the remainder. A random
            hash is `numpy.random.default_rng(0).integers(num_experts, size=vocabulary_size)`.
        capacity_factor: slots per expert, relative to `tokens / num_experts`, while training;
            `None` drops nothing.
        eval_capacity_factor: the same in inference.
        min_capacity: fewest slots per expert and group.

    Call arguments:
        inputs: `[groups, tokens, dim]` tensor.
        mask: `[groups, tokens]` booleans, `False` for padding.
        training: boolean.
        compact: see `TopKRouter`.
        token_ids: `[groups, tokens]` integers.

    Returns:
        A `Routing` whose `probabilities` are 0 and 1, and whose `logits` are `None`.

    Raises:
        ValueError: if an argument is out of range.
    """

    needs_token_ids = True

    def __init__(
        self,
        num_experts=None,
        table=None,
        capacity_factor=None,
        eval_capacity_factor=None,
        min_capacity=4,
        **kwargs,
    ):
        self.table = table
        if table is not None:
            array = np.asarray(table)
            is_list = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
            if not is_list or array.min(initial=0) < 0 or array.size == 0:
                raise ValueError(
                    "`table` must be a list of integers from 0 on, or None. "
                    f"Received: table={table}"
                )
            self.table = array.tolist()
        super().__init__(
            k=1,
            num_experts=num_experts,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            load_balancing_weight=0.0,
            **layer_options(self, kwargs),
        )

    def set_num_experts(self, num_experts):
        if self.table is not None and max(self.table) >= num_experts:
            raise ValueError(
                "`table` must name experts below the number of experts. "
                f"Received: a table with {max(self.table)} for num_experts={num_experts}"
            )
        super().set_num_experts(num_experts)

    def add_kernel(self, dim):
        """None: there is nothing to learn."""

    def call(self, inputs, mask=None, training=False, compact=False, token_ids=None):
        if token_ids is None:
            raise ValueError(
                "`token_ids` must be given to a `HashRouter`. Received: token_ids=None"
            )
        table = range(self.num_experts) if self.table is None else self.table
        table = ops.convert_to_tensor(np.array(table, "int32"))  # of a list it would take 150 ms
        expert_GS = ops.take(table, ops.cast(token_ids, "int32") % table.shape[0])
        expert_E = ops.arange(self.num_experts, dtype="int32")
        one_hot_GSE = ops.cast(expert_GS[:, :, None] == expert_E, "float32")
        return self.route(None, one_hot_GSE, mask, training, compact)

    def get_config(self):
        config = super().get_config()
        for name in (
            "k",
            "priority",
            "normalize",
            "load_balancing_weight",
            "jitter",
            "router_z_weight",
            "kernel_initializer",
            "seed",
        ):
            del config[name]
        return {**config, "table": self.table}
