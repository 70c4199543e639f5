"""Faults of `keras_moe`."""

from tests.mutations.fault import Fault

FAULTS = (
    Fault(
        "keras_moe/slots.py",
        "slots = -(-tokens * k * factor.numerator // (num_experts * factor.denominator))",
        "slots = tokens * k * factor.numerator // (num_experts * factor.denominator)",
        "the capacity is rounded down",
    ),
    Fault(
        "keras_moe/slots.py",
        "kept_GN = (rank_GN < capacity)",
        "kept_GN = (rank_GN <= capacity)",
        "each expert keeps one assignment more than its capacity",
    ),
    Fault(
        "keras_moe/slots.py",
        "ops.reshape(token_GS[:, None] * k + choice_K1, (groups, tokens * k))",
        "ops.reshape(token_GS[:, :, None] * k + choice_K1[:, 0], (groups, tokens * k))",
        "by priority, a token's second choice comes before the next token's first choice",
    ),
    Fault(
        "keras_moe/slots.py",
        "ops.argsort(-confidence_GS, axis=1)",
        "ops.argsort(confidence_GS, axis=1)",
        "by priority, the least confident tokens come first",
    ),
    Fault(
        "keras_moe/slots.py",
        "wish_GES = ops.where(mask_GS[:, None, :], wish_GES, -1.0)",
        "wish_GES = ops.where(mask_GS[:, None, :], wish_GES, 0.0)",
        "experts that choose fill their last slots with padding",
    ),
    Fault(
        "keras_moe/slots.py",
        "seated_GS = rank_GS + _of_experts(taken_GE, asked_GS) < capacity",
        "seated_GS = rank_GS < capacity",
        "rerouting forgets the slots that earlier rounds filled",
    ),
    Fault(
        "keras_moe/dispatch.py",
        "(row_GN * groups + group_G1) * slots + slot_GN % slots",
        "(group_G1 * rows + row_GN) * slots + slot_GN % slots",
        "the axes of groups and rows are swapped on the way back",
    ),
    Fault(
        "keras_moe/dispatch.py",
        "lambda: upstream_MD * ops.cast(weight_M[:, None], upstream_MD.dtype),",
        "lambda: upstream_MD,",
        "the gradient of the experts' outputs lacks the gate",
    ),
    Fault(
        "keras_moe/losses/balance.py",
        "    total = ops.sum(_without_padding(x, mask), axis=axes)\n"
        "    return total / ops.maximum(ops.sum(ops.cast(mask, x.dtype)), 1.0)",
        "    return ops.mean(_without_padding(x, mask), axis=axes)",
        "means divide by the number of all tokens, padding included",
    ),
    Fault(
        "keras_moe/losses/balance.py",
        "ops.logsumexp(logits, axis=-1, keepdims=True)",
        "ops.logsumexp(logits, axis=0, keepdims=True)",
        "the router z-loss sums over the first axis, not over experts",
    ),
    Fault(
        "keras_moe/losses/balance.py",
        'sequences = ops.sum(ops.cast(tokens_G1 > 0, "float32"))',
        'sequences = ops.cast(groups, "float32")',
        "the sequence balancing loss averages over sequences of padding too",
    ),
    Fault(
        "keras_moe/losses/balance.py",
        "threshold = ops.where(noisy_logits > next_one, next_one, kth)",
        "threshold = kth",
        "a chosen expert competes with itself in the load loss",
    ),
    Fault(
        "keras_moe/routing/base.py",
        '{"name": "router", **kwargs, "dtype": "float32"}',
        '{"name": "router", **kwargs}',
        "the router computes in the dtype policy, not in float32",
    ),
    Fault(
        "keras_moe/routing/base.py",
        "if training and self.jitter > 0:",
        "if self.jitter > 0:",
        "the input is jittered at inference",
    ),
    Fault(
        "keras_moe/routing/base.py",
        "inputs = ops.where(ops.expand_dims(mask, -1), inputs, 0.0)",
        'inputs = inputs * ops.cast(ops.expand_dims(mask, -1), "float32")',
        "NaN at padding is multiplied by 0 and stays NaN",
    ),
    Fault(
        "keras_moe/routing/base.py",
        '            "router_z_weight": self.router_z_weight,\n',
        "",
        "the config lacks the weight of the router z-loss",
    ),
    Fault(
        "keras_moe/routing/token_choice.py",
        "factor = self.capacity_factor if training else self.eval_capacity_factor",
        "factor = self.capacity_factor",
        "the training capacity is used at inference",
    ),
    Fault(
        "keras_moe/routing/token_choice.py",
        "if self.normalize and self.k > 1:",
        "if self.normalize:",
        "with one expert per token the weight is always 1",
    ),
    Fault(
        "keras_moe/routing/loss_free.py",
        "if training and self.trainable:",
        "if self.trainable:",
        "the bias is updated at inference",
    ),
    Fault(
        "keras_moe/routing/loss_free.py",
        "ops.sign(ops.mean(count_E) - count_E)",
        "ops.sign(count_E - ops.mean(count_E))",
        "the bias of a busy expert grows",
    ),
    Fault(
        "keras_moe/moe.py",
        "mask = inputs_mask if mask is None else mask",
        "pass",
        "an upstream mask is lost when token ids are given",
    ),
    Fault(
        "keras_moe/soft.py",
        "dispatch_GSN = ops.softmax(logits_GSN, axis=1)",
        "dispatch_GSN = ops.softmax(logits_GSN, axis=-1)",
        "the softmax of the dispatch is over slots, not over tokens",
    ),
)
