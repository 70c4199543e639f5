"""Expert choice against token choice on masked bytes, where looking ahead is allowed.

    python -m benchmarks.papers.expert_choice_2022             30 minutes on 2 cores; start it twice
    python -m benchmarks.papers.expert_choice_2022 --quick     2 to 3 minutes

Zhou et al. 2022 (https://arxiv.org/abs/2202.09368), section 4: expert choice at capacity 2, 1 and
0.5, top-2 with GShard's capacity (seated in token order, without its random second choice) and
Switch, 16 experts each, and a dense model with the FLOPs of two experts.
Bytes of novels, one in seven hidden, one pass, see `byte_model`; experts choose among the tokens of
a batch. The trained models are also evaluated on one sequence at a time, where experts have only
its own tokens to choose among.
"""

import numpy as np

from benchmarks.papers import comparison
from benchmarks.tables import markdown, mean_sd

MASKED = {"objective": "masked", "hidden": 64}
SPARSE = {**MASKED, "experts": 16}
CHOICES = {
    f"expert choice, {c:g}": {**SPARSE, "kind": "expert_choice", "capacity": c}
    for c in (2.0, 1.0, 0.5)
}
CONTESTANTS = {
    "top-2": {**SPARSE, "kind": "top_k", "k": 2, "capacity": 1.0},
    "Switch": {**SPARSE, "kind": "switch", "capacity": 1.25},
    **CHOICES,
    "dense": {**MASKED, "kind": "dense", "hidden": 128},
}
FULL = {**comparison.FULL, "steps": 600}
MOST = 5  # experts per token that the table tells apart
SIZES = 32, 1  # sequences that are evaluated at once


def main(arguments=None):
    chosen, train, runs = comparison.start(
        "expert_choice_2022", __doc__, arguments, CONTESTANTS, watch=watch
    )
    protocol = comparison.QUICK if chosen.quick else FULL
    results = comparison.compare(runs, train, CONTESTANTS, protocol)
    print(comparison.table(results, "top-2"))
    print()
    print(table(results))
    print()
    print(table_of_sizes(results))
    if not chosen.quick:
        print("\n" + table_of_leaks())
    print(comparison.tuning_table(runs, train, CONTESTANTS, protocol))
    comparison.draw(results, chosen.into / "expert_choice_2022.png", "nats per hidden byte")


def watch(model, inputs, targets, weights):
    """What is asked of a trained model on text it has not seen."""
    return {
        **shares(model, inputs),
        **{
            f"nats_by_{size}": model.evaluate(inputs, targets, size, 0, weights, return_dict=True)[
                "nats"
            ]
            for size in SIZES
        },
    }


def shares(model, inputs):
    """Share of the tokens that 0, 1, ... experts serve, means over batches and layers."""
    import keras
    from keras import ops

    from benchmarks.papers.byte_model import BATCH
    from keras_moe.metrics import experts_per_token_histogram

    layers = [layer for layer in model.layers if hasattr(layer, "router")]
    if not layers:
        return {}
    before = keras.Model(model.input, [layer.input for layer in layers])
    found = []
    for start in range(0, len(inputs), BATCH):
        tokens = before(inputs[start : start + BATCH])
        for layer, x in zip(layers, tokens if isinstance(tokens, list) else [tokens], strict=True):
            routing = layer.router(ops.reshape(x, (1, -1, x.shape[-1])), training=True)
            tokens_of = ops.convert_to_numpy(experts_per_token_histogram(routing))
            share = tokens_of / tokens_of.sum()
            found.append([*share[:MOST], share[MOST:].sum()])
    return {"experts_per_token": np.mean(found, axis=0).tolist()}


def table(results):
    rows = [
        [
            name,
            *(
                mean_sd(100 * share, 1)
                for share in np.transpose([r["experts_per_token"] for r in of_seeds])
            ),
        ]
        for name, of_seeds in results.items()
        if "experts_per_token" in of_seeds[0]
    ]
    header = ["% of tokens with experts", *map(str, range(MOST)), f"{MOST} or more"]
    return markdown(header, rows)


def table_of_sizes(results):
    rows = [
        [name, *(mean_sd([r[f"nats_by_{size}"] for r in of_seeds], 3) for size in SIZES)]
        for name, of_seeds in results.items()
    ]
    return markdown(["nats per hidden byte, sequences at once", *map(str, SIZES)], rows)


def table_of_leaks():
    """How far each router's outputs change when later tokens of the sequence do, at most."""
    import keras

    from tests.keras_moe.test_leaks import CASES, built, future_edit

    keras.utils.set_random_seed(0)
    rows = []
    for name, (make, _, drops) in CASES.items():
        changes = [
            future_edit(built(make()), np.s_[0, 4:], training=training)[0, :4].max()
            for training in (True, False)
        ]
        rows.append([name, "yes" if drops else "no", *(f"{change:.2g}" for change in changes)])
    return markdown(["change by later tokens", "drops", "training", "inference"], rows)


if __name__ == "__main__":
    main()
