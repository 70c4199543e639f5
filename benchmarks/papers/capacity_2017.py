"""The sparsely-gated layer of 2017: more capacity at the same FLOPs per token.

    python -m benchmarks.papers.capacity_2017             40 minutes on 2 cores; start it twice
    python -m benchmarks.papers.capacity_2017 --quick     2 to 3 minutes

Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Table 7 and Figure 2: four active experts of
n, noisy top-k gating, both balancing losses at 0.1, nothing dropped. Bytes of novels, next-byte
prediction, one pass, see `byte_model`. The dense baselines are one wide expert with the FLOPs of
four (the paper's MoE-1-Wide), and one with the parameters of 64; both are trained by
`experts_switch` already, if that was run before.
"""

from benchmarks.papers import comparison

NOISY = {"kind": "noisy", "k": 4, "hidden": 16}
NOISY["router"] = {"importance_weight": 0.1, "load_weight": 0.1}
CONTESTANTS = {
    "dense": {"kind": "dense", "hidden": 4 * 16},
    "dense, parameters of 64 experts": {"kind": "dense", "hidden": 64 * 16},
    **{f"4 of {n} experts": {**NOISY, "experts": n} for n in (4, 16, 64)},
}


def main(arguments=None):
    comparison.main(
        "capacity_2017", __doc__, CONTESTANTS, "dense", arguments, shares=["experts_switch"]
    )


if __name__ == "__main__":
    main()
