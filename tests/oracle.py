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


def switch_choice(probabilities_GSE, first_GS, reroutes, capacity, mask=None):
    """Combine weights and first choices, `[G, S, E]` each, of Switch Transformers' appendix B.

    Stage by stage, a token whose expert is full asks the most probable one that it has not asked.
    """
    groups, tokens, num_experts = probabilities_GSE.shape
    weight = np.zeros(probabilities_GSE.shape)
    chosen = np.zeros(probabilities_GSE.shape)
    for g in range(groups):
        taken = [0] * num_experts
        standing = [s for s in range(tokens) if mask is None or mask[g, s]]
        for stage in range(1 + reroutes):
            for s in list(standing):
                p, first = probabilities_GSE[g, s], first_GS[g, s]
                others = [e for e in np.argsort(-p, kind="stable") if e != first]
                e = [first, *others][stage]
                if stage == 0:
                    chosen[g, s, e] = 1
                if taken[e] < capacity:
                    taken[e] += 1
                    weight[g, s, e] = p[e]
                    standing.remove(s)
    return weight, chosen


def biased_choice(score_E, bias_E, k, num_groups=None, top_groups=None, best_of_group=2):
    """One token's experts in DeepSeek-V3, section 2.1.2; in V2 with `best_of_group=1`."""
    wish_E = score_E + bias_E
    groups = np.split(np.arange(len(wish_E)), num_groups or 1)
    total = [np.sort(wish_E[group])[::-1][:best_of_group].sum() for group in groups]
    best = np.argsort(-np.array(total), kind="stable")[: top_groups or 1]
    eligible = np.concatenate([groups[g] for g in np.sort(best)])
    return eligible[np.argsort(-wish_E[eligible], kind="stable")[:k]]


def expert_choice(
    probabilities_GSE, capacity, mask=None, max_experts_per_token=None, by_programme=False
):
    """Combine weights `[G, S, E]` when every expert takes its best tokens.

    With a cap in rounds of questions and answers, and then of swaps one by one.
    """
    weight = np.zeros(probabilities_GSE.shape)
    for g, p_SE in enumerate(probabilities_GSE):
        tokens, num_experts = p_SE.shape
        cap = max_experts_per_token or num_experts
        valid = [s for s in range(tokens) if mask is None or mask[g, s]]
        capacity_here = min(capacity, len(valid))
        order_SE = p_SE
        if by_programme and cap < num_experts and valid:
            order_SE = np.full(p_SE.shape, -1.0)
            order_SE[valid] = linear_programme(p_SE[valid].T, capacity_here, cap)[1].T
        seats = _in_rounds(p_SE, order_SE, valid, capacity_here, cap)
        _swap(seats, p_SE, valid, capacity_here, cap)
        for s, e in seats:
            weight[g, s, e] = p_SE[s, e]
    return weight


def _in_rounds(p_SE, order_SE, valid, capacity, cap):
    """Seats, pairs of token and expert: short experts ask, tokens with room take the best."""
    seats = set()
    while True:
        asking = {s: [] for s in valid}
        for e in range(p_SE.shape[1]):
            short = capacity - sum(by == e for _, by in seats)
            room = [s for s in valid if (s, e) not in seats and _served(seats, s) < cap]
            for s in sorted(room, key=lambda s, e=e: (-order_SE[s, e], s))[:short]:
                asking[s].append(e)
        if not any(asking.values()):
            return seats
        for s, experts in asking.items():
            best_first = sorted(experts, key=lambda e, s=s: (-p_SE[s, e], e))
            seats |= {(s, e) for e in best_first[: cap - _served(seats, s)]}
        order_SE = p_SE


def _served(seats, s):
    return sum(token == s for token, _ in seats)


def _swap(seats, p_SE, valid, capacity, cap):
    """Expert i is short and holds t, a token with room: m gives it s and takes t."""
    experts = range(p_SE.shape[1])
    while True:
        short = [capacity - sum(by == e for _, by in seats) for e in experts]
        room = [s for s in valid if _served(seats, s) < cap]
        if max(short) <= 0 or not room:
            return
        i = int(np.argmax(short))
        t = max(room, key=lambda s: (p_SE[s, i], -s))
        givers = [(m, s) for s, m in seats if (s, i) not in seats and (t, m) not in seats]
        m, s = max(givers, key=lambda ms: p_SE[t, ms[0]] - p_SE[ms[1], ms[0]] + p_SE[ms[1], i])
        seats ^= {(s, m), (t, m), (s, i)}


def linear_programme(score_ES, capacity, cap, temperature=1e-3, iterations=100):
    """Dykstra's algorithm as it is written, with a correction for each of the three sets.

    Long doubles, whose exponents reach far enough for `exp(1000)`.

    Returns:
        `A` and, for the order, `A` before its last projection, onto `A <= 1`.
    """
    a_ES = np.exp(score_ES.astype("longdouble") / temperature)
    corrections = [np.ones_like(a_ES) for _ in range(3)]
    projections = [
        lambda y: y * capacity / y.sum(axis=1, keepdims=True),
        lambda y: y * np.minimum(1, cap / y.sum(axis=0, keepdims=True)),
        lambda y: np.minimum(y, 1),
    ]
    for _ in range(iterations):
        for n, project in enumerate(projections):
            before_ES = a_ES * corrections[n]
            a_ES = project(before_ES)
            corrections[n] = before_ES / a_ES
    return a_ES, before_ES


def threshold_choice(probabilities_GSE, threshold_E, cap, mask=None):
    """Combine weights `[G, S, E]`: of a token's `cap` best experts those that do not refuse it."""
    weight = np.zeros(probabilities_GSE.shape)
    for g, s in np.ndindex(*probabilities_GSE.shape[:2]):
        p = probabilities_GSE[g, s]
        for e in np.argsort(-p, kind="stable")[:cap]:
            if p[e] >= threshold_E[e] and (mask is None or mask[g, s]):
                weight[g, s, e] = p[e]
    return weight


def strictly_balanced(weight_GSE):
    """Shazeer et al. 2017, Eq. 16: scores where an expert takes a token, divided by their sum."""
    total = weight_GSE.sum(axis=-1, keepdims=True)
    return np.divide(weight_GSE, total, where=total > 0, out=np.zeros(weight_GSE.shape))


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
    total = np.zeros(logits.shape[-1])
    for at in np.ndindex(*logits.shape[:-1]):
        if mask is None or mask[at]:
            total += chances(logits[at], noisy_logits[at], noise_scale[at], k)
    return squared_variation(total)


def mixture_loss(form, target, outputs_EO, gate_logits_E):
    """Jacobs et al. 1991, Eqs. 3, 1 and 2 for one case; the last for distributions over classes."""
    proportions = softmax(gate_logits_E)
    if form == "cooperative":
        return float(np.sum((target - proportions @ outputs_EO) ** 2))
    total = 0.0
    for p, output in zip(proportions, outputs_EO, strict=True):
        if form == "classification":
            total += p * softmax(output)[target]
        else:
            distance = np.sum((target - output) ** 2)
            total += p * (distance if form == "competitive" else np.exp(-0.5 * distance))
    return float(total if form == "competitive" else -np.log(total))


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


def batchwise_threshold(probabilities_GSE, taken_GSE, threshold_E, mask=None):
    """Shazeer et al. 2017, Eq. 20, divided by the number of tokens."""
    valid = np.ones(probabilities_GSE.shape[:2], bool) if mask is None else mask
    total = 0.0
    for g, s, e in np.ndindex(*probabilities_GSE.shape):
        if valid[g, s]:
            beyond = probabilities_GSE[g, s, e] - threshold_E[e]
            total += (int(beyond > 0) - int(taken_GSE[g, s, e] > 0)) * beyond
    return float(total / max(valid.sum(), 1))


def adafactor(variable, gradients, rate, per_expert=False):
    """A variable after some steps of Adafactor, each expert's slice by itself.

    Shazeer and Stern 2018, Algorithms 4 and 5, with its defaults: beta_2 = 1 - t^-.8, epsilons
    1e-30 and 1e-3, clipping at 1.
    """
    if per_expert:
        slices = zip(variable, np.swapaxes(gradients, 0, 1), strict=True)
        return np.stack([adafactor(x, g, rate) for x, g in slices])
    x = variable.astype("float64")
    rows = columns = whole = 0.0
    for t, g in enumerate(gradients, 1):
        past = 1 - t**-0.8
        squares = g.astype("float64") ** 2 + 1e-30
        if x.ndim < 2:
            v = whole = past * whole + (1 - past) * squares
        else:
            rows = past * rows + (1 - past) * squares.mean(axis=-1)
            columns = past * columns + (1 - past) * squares.mean(axis=-2)
            outer = rows[..., :, None] * columns[..., None, :]
            v = outer / rows.mean(axis=-1)[..., None, None]
        u = g / np.sqrt(v)
        u = u / max(1, np.sqrt(np.mean(u**2)))
        x = x - min(rate, t**-0.5) * max(1e-3, np.sqrt(np.mean(x**2))) * u
    return x


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
