"""The balancing losses of 2017: six weightings, and what they do to balance and to quality.

    python -m benchmarks.papers.balancing_2017             50 minutes on 2 cores; start it twice
    python -m benchmarks.papers.balancing_2017 --quick     2 to 3 minutes

Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Table 6: noisy top-k gating with 4 of 64
experts, nothing dropped, so that quality does not depend on balance by way of dropped tokens. The
figures of balance are those of the noisy gates on 20 batches that were not trained on, as in the
paper, means over batches and layers. Bytes of novels, next-byte prediction, one pass.
"""

import numpy as np

from benchmarks.papers import comparison
from benchmarks.tables import markdown, mean_sd

WEIGHTS = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1), (0.01, 0.01), (1.0, 1.0))
CONTESTANTS = {
    f"importance {importance:g}, load {load:g}": {
        "kind": "noisy",
        "experts": 64,
        "k": 4,
        "hidden": 16,
        "router": {"importance_weight": importance, "load_weight": load},
    }
    for importance, load in WEIGHTS
}
FULL = {**comparison.FULL, "steps": 600}


def main(arguments=None):
    chosen, train, runs = comparison.start(
        "balancing_2017", __doc__, arguments, CONTESTANTS, watch=balance
    )
    protocol = comparison.QUICK if chosen.quick else FULL
    results = comparison.compare(runs, train, CONTESTANTS, protocol)
    print(table(results))
    print("\n" + comparison.table(results, "importance 0.1, load 0.1"))
    print(comparison.tuning_table(runs, train, CONTESTANTS, protocol))
    comparison.draw(results, chosen.into / "balancing_2017.png")


def balance(model, inputs, *targets_and_weights):
    """How evenly the noisy gates share out `inputs`, means over batches and layers."""
    import keras
    from keras import ops

    from benchmarks.papers.byte_model import BATCH

    layers = [layer for layer in model.layers if hasattr(layer, "router")]
    before = keras.Model(model.input, [layer.input for layer in layers])
    found = []
    for start in range(0, len(inputs), BATCH):
        tokens = before(inputs[start : start + BATCH])
        for layer, x in zip(layers, tokens if isinstance(tokens, list) else [tokens], strict=True):
            router = layer.router
            routing = router(ops.reshape(x, (1, -1, x.shape[-1])), training=True)
            count = np.bincount(np.ravel(routing.expert_index), minlength=router.num_experts)
            found.append(
                {
                    "cv_importance": float(router.importance(routing)) ** 0.5,
                    "cv_load": float(router.load(routing)) ** 0.5,
                    "max_mean_load": float(count.max() / count.mean()),
                }
            )
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def table(results):
    rows = []
    for name, of_seeds in results.items():
        perplexity = mean_sd([np.exp(r["loss"]) for r in of_seeds], 3)
        measured = (
            mean_sd([r[figure] for r in of_seeds], 2)
            for figure in ("cv_importance", "cv_load", "max_mean_load")
        )
        rows.append([name, f"{of_seeds[0]['learning_rate']:g}", perplexity, *measured])
    header = ["weights", "rate", "perplexity per byte", "CV(importance)", "CV(load)"]
    return markdown([*header, "max/mean load"], rows)


if __name__ == "__main__":
    main()
