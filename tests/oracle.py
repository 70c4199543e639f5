"""The one NumPy loop, in float64, that every router, dispatch form and backend must match.

Token by token and expert by expert, nothing clever: what the papers' equations say, drops and
padding included.
"""

import math

import numpy as np


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def token_choice(probabilities_GSE, k, capacity=None, normalize=True, mask=None):
    """Combine weights `[G, S, E]`, 0 where a token does not reach an expert; and the choices."""
    groups, tokens, num_experts = probabilities_GSE.shape
    weight = np.zeros(probabilities_GSE.shape)
    chosen = np.zeros(probabilities_GSE.shape)
    for g in range(groups):
        taken = [0] * num_experts
        for s in range(tokens):
            if mask is not None and not mask[g, s]:
                continue
            p = probabilities_GSE[g, s]
            best = np.argsort(-p, kind="stable")[:k]
            total = p[best].sum() if normalize and k > 1 else 1.0
            for e in best:
                chosen[g, s, e] = 1
                if capacity is None or taken[e] < capacity:
                    weight[g, s, e] = p[e] / total
                taken[e] += 1
    return weight, chosen


def expert_choice(probabilities_GSE, capacity, mask=None, max_experts_per_token=None):
    """Combine weights `[G, S, E]` when every expert takes its best tokens.

    With a cap, one offer at a time (Gale and Shapley 1962): the result does not depend on who asks
    first.
    """
    weight = np.zeros(probabilities_GSE.shape)
    for g, p_SE in enumerate(probabilities_GSE):
        tokens, num_experts = p_SE.shape
        cap = max_experts_per_token or num_experts
        valid = [s for s in range(tokens) if mask is None or mask[g, s]]
        wishes = [sorted(valid, key=lambda s, e=e: (-p_SE[s, e], s)) for e in range(num_experts)]
        served_by = {s: [] for s in valid}
        asking = True
        while asking:
            seated = [sum(e in by for by in served_by.values()) for e in range(num_experts)]
            asking = [e for e in range(num_experts) if seated[e] < capacity and wishes[e]]
            for e in asking[:1]:
                s = wishes[e].pop(0)
                best_first = sorted([*served_by[s], e], key=lambda e, s=s: (-p_SE[s, e], e))
                served_by[s] = best_first[:cap]
        for s, by in served_by.items():
            weight[g, s, by] = p_SE[s, by]
    return weight


def threshold_choice(probabilities_GSE, threshold_E, cap, mask=None):
    """Combine weights `[G, S, E]`: of a token's `cap` best experts those that do not refuse it."""
    weight = np.zeros(probabilities_GSE.shape)
    for g, s in np.ndindex(*probabilities_GSE.shape[:2]):
        p = probabilities_GSE[g, s]
        for e in np.argsort(-p, kind="stable")[:cap]:
            if p[e] >= threshold_E[e] and (mask is None or mask[g, s]):
                weight[g, s, e] = p[e]
    return weight


def in_groups(x, mask, group):
    """Tokens as `[G, S, D]` and their mask `[G, S]`; the last group is filled up with padding."""
    if x.ndim == 3 and group == "sequence":
        return x, np.ones(x.shape[:2], bool) if mask is None else mask
    tokens = x.reshape(-1, x.shape[-1])
    size = group if isinstance(group, int) else len(tokens)
    padding = -len(tokens) % size
    mask = np.ones(len(tokens), bool) if mask is None else mask.reshape(-1)
    tokens = np.concatenate([tokens, np.zeros((padding, x.shape[-1]))])
    mask = np.concatenate([mask, np.zeros(padding, bool)])
    return tokens.reshape(-1, size, x.shape[-1]), mask.reshape(-1, size)


def capacity(tokens, num_experts, factor, k=1, minimum=1):
    return max(minimum, math.ceil(round(tokens * k * factor / num_experts, 9)))


def feed_forward(x_D, weights, e):
    """Expert `e` of a `FeedForwardExperts` with relu; gated and biased if it has such weights."""
    hidden = x_D @ weights["kernel_in"][e]
    if "bias_in" in weights:
        hidden = hidden + weights["bias_in"][e]
    if "kernel_gate" in weights:
        hidden = np.maximum(x_D @ weights["kernel_gate"][e], 0) * hidden
    else:
        hidden = np.maximum(hidden, 0)
    y = hidden @ weights["kernel_out"][e]
    return y + weights["bias_out"][e] if "bias_out" in weights else y


def mixture(x_GSD, weight_GSE, expert):
    """`y = sum_e weight_e * expert(x, e)`, Eq. 1 of the 2017 paper."""
    y = np.zeros((*x_GSD.shape[:2], len(expert(x_GSD[0, 0], 0))))
    for g, s, e in zip(*np.nonzero(weight_GSE), strict=True):
        y[g, s] += weight_GSE[g, s, e] * expert(x_GSD[g, s], e)
    return y


def load_balancing(probabilities, chosen, mask=None):
    """Switch Transformers, Eqs. 4-6, over all tokens that are not padding."""
    valid = np.ones(probabilities.shape[:-1], bool) if mask is None else mask
    share = chosen[valid].sum(axis=0) / chosen[valid].sum()
    return probabilities.shape[-1] * float(share @ probabilities[valid].mean(axis=0))


def router_z(logits, mask=None):
    """ST-MoE, Eq. 5."""
    valid = np.ones(logits.shape[:-1], bool) if mask is None else mask
    top = logits.max(axis=-1)
    log_sum = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    return float(np.mean(log_sum[valid] ** 2))


def squared_variation(x):
    return float(np.var(x) / np.mean(x) ** 2)


def importance(weight, mask=None):
    """Shazeer et al. 2017, Eqs. 6-7."""
    valid = np.ones(weight.shape[:-1], bool) if mask is None else mask
    return squared_variation(weight[valid].sum(axis=0))


def load(logits, noisy_logits, noise_scale, k, mask=None):
    """Shazeer et al. 2017, Eqs. 8-11."""
    total = np.zeros(logits.shape[-1])
    for at in np.ndindex(*logits.shape[:-1]):
        if mask is None or mask[at]:
            total += chances(logits[at], noisy_logits[at], noise_scale[at], k)
    return squared_variation(total)


def chances(logits_E, noisy_E, scale_E, k):
    """Eq. 9: the probability of each expert to be chosen with new noise of its own."""
    result = np.ones(len(logits_E))
    for e in range(len(result) if k < len(result) else 0):
        others = np.sort(np.delete(noisy_E, e))[::-1]
        z = (logits_E[e] - others[k - 1]) / scale_E[e]
        result[e] = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return result


def hierarchical(primary, secondary, k, secondary_k, mask):
    """Shazeer et al. 2017, appendix B: gates `[G, S, A*B]` (Eq. 12), and both losses (13, 14).

    `primary` is logits, noise and its scale, `[G, S, A]` each; of `secondary` logits and scale are
    `[G, S, A, B]`, while the noise, `[G, S, k, B]`, is that of the token's best group, the next...
    """
    groups, tokens, a, b = secondary[0].shape
    gates, load_A = np.zeros((groups, tokens, a, b)), np.zeros(a)
    load_AB, members_A = np.zeros((a, b)), np.zeros(a)

    def gate(logits, k):
        p = softmax(logits)
        best = np.argsort(-p, kind="stable")[:k]
        return p[best] / (p[best].sum() if k > 1 else 1.0), best

    for g, s in zip(*np.nonzero(mask), strict=True):
        clean_A, noise_A, scale_A = (x[g, s] for x in primary)
        noisy_A = clean_A + noise_A * scale_A
        load_A += chances(clean_A, noisy_A, scale_A, k)
        for rank, (weight, i) in enumerate(zip(*gate(noisy_A, k), strict=True)):
            clean_B, scale_B = secondary[0][g, s, i], secondary[2][g, s, i]
            noisy_B = clean_B + secondary[1][g, s, rank] * scale_B
            load_AB[i] += chances(clean_B, noisy_B, scale_B, secondary_k)
            members_A[i] += 1
            weight_P, best_P = gate(noisy_B, secondary_k)
            gates[g, s, i, best_P] = weight * weight_P

    load_AB = load_A[:, None] * load_AB / np.maximum(members_A, 1)[:, None]
    importance_AB = gates.sum(axis=(0, 1))
    gates = gates.reshape(groups, tokens, a * b)
    return gates, squared_variation(importance_AB), squared_variation(load_AB)


def drop(weight_GSE, capacity):
    """What is left of the weights when each expert keeps a group's first `capacity` tokens."""
    return weight_GSE * (np.cumsum(weight_GSE > 0, axis=1) <= capacity)


def gradient(function, arrays, step=1e-6):
    """Central differences of a scalar function of a list of float64 arrays."""
    result = []
    for array in arrays:
        slope = np.zeros(array.shape)
        for at in np.ndindex(*array.shape):
            value = array[at]
            array[at] = value + step
            above = function()
            array[at] = value - step
            slope[at] = (above - function()) / (2 * step)
            array[at] = value
        result.append(slope)
    return result
