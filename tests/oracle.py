"""The one NumPy loop, in float64, that every router, dispatch form and backend must match.

Token by token and expert by expert, nothing clever: what the papers' equations say, drops and
padding included.
"""

import math

import numpy as np


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def token_choice(
    probabilities_GSE, k, capacity=None, normalize=True, mask=None, priority="position"
):
    """Combine weights `[G, S, E]`, 0 where a token does not reach an expert; and the choices."""
    weight = np.zeros(probabilities_GSE.shape)
    chosen = np.zeros(probabilities_GSE.shape)
    for g, p_SE in enumerate(probabilities_GSE):
        taken = [0] * p_SE.shape[1]
        valid = [s for s in range(len(p_SE)) if mask is None or mask[g, s]]
        best = np.argsort(-p_SE, axis=1, kind="stable")[:, :k]
        if priority == "position":
            turns = [(s, i) for s in valid for i in range(k)]
        else:  # V-MoE, Algorithm 2
            surest_first = sorted(valid, key=lambda s, p_SE=p_SE: -p_SE[s].max())
            turns = [(s, i) for i in range(k) for s in surest_first]
        for s, i in turns:
            e, total = best[s, i], p_SE[s, best[s]].sum() if normalize and k > 1 else 1.0
            chosen[g, s, e] = 1
            if capacity is None or taken[e] < capacity:
                weight[g, s, e] = p_SE[s, e] / total
            taken[e] += 1
    return weight, chosen


def biased_choice(score_E, bias_E, k, num_groups=None, top_groups=None, best_of_group=2):
    """One token's experts in DeepSeek-V3, section 2.1.2; in V2 with `best_of_group=1`."""
    wish_E = score_E + bias_E
    groups = np.split(np.arange(len(wish_E)), num_groups or 1)
    total = [np.sort(wish_E[group])[::-1][:best_of_group].sum() for group in groups]
    best = np.argsort(-np.array(total), kind="stable")[: top_groups or 1]
    eligible = np.concatenate([groups[g] for g in np.sort(best)])
    return eligible[np.argsort(-wish_E[eligible], kind="stable")[:k]]


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


def soft_moe(x_SD, phi_DEP, scale, expert):
    """Puigcerver et al. 2023, sections 2.1 and 2.3, of one sequence without padding."""
    x_SD, dim = np.asarray(x_SD), len(phi_DEP)
    unit_x_SD = x_SD / np.linalg.norm(x_SD, axis=1, keepdims=True)
    phi_DN = phi_DEP.reshape(dim, -1)
    logits_SN = unit_x_SD @ (scale * phi_DN / np.linalg.norm(phi_DN, axis=0))
    slots_ND = softmax(logits_SN.T) @ x_SD
    y_ND = [expert(slot_D, n // phi_DEP.shape[2]) for n, slot_D in enumerate(slots_ND)]
    return softmax(logits_SN) @ np.array(y_ND)


def load_balancing(probabilities, chosen, mask=None):
    """Switch Transformers, Eqs. 4-6, over all tokens that are not padding."""
    valid = np.ones(probabilities.shape[:-1], bool) if mask is None else mask
    share = chosen[valid].sum(axis=0) / chosen[valid].sum()
    return probabilities.shape[-1] * float(share @ probabilities[valid].mean(axis=0))


def sequence_balancing(probabilities, chosen, mask=None):
    """DeepSeek-V3, Eqs. 17-20: the mean over the sequences that are not padding altogether."""
    mask = np.ones(probabilities.shape[:-1], bool) if mask is None else mask
    sequences = zip(probabilities, chosen, mask, strict=True)
    return np.mean([load_balancing(p, c, m) for p, c, m in sequences if m.any()])


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
    num_experts = logits.shape[-1]
    total = np.zeros(num_experts)
    for at in np.ndindex(*logits.shape[:-1]):
        for e in range(num_experts):
            if mask is None or mask[at]:
                others = np.sort(np.delete(noisy_logits[at], e))[::-1]
                z = (logits[at][e] - others[k - 1]) / noise_scale[at][e] if k < num_experts else 9
                total[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return squared_variation(total)


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
