"""Switch Transformers: more experts at the same FLOPs per token.

    python -m benchmarks.papers.experts_switch             45 minutes on 2 cores; start it twice
    python -m benchmarks.papers.experts_switch --quick     2 to 3 minutes

Fedus et al. 2022 (https://arxiv.org/abs/2101.03961), Figure 4, appendix D and the speed-up of
section 3.1: the steps that the dense model takes over those in which the sparse one reaches the
dense model's last loss. Bytes of novels, next-byte prediction, one pass, see `byte_model`. The
dense baselines have the same FLOPs per token, and the parameters of 16 experts.
"""

from benchmarks.papers import comparison

SWITCH = {"kind": "switch", "hidden": 64, "capacity": 1.25, "init_scale": 0.1}
CONTESTANTS = {
    "dense": {"kind": "dense", "hidden": 64},
    "dense, parameters of 16 experts": {"kind": "dense", "hidden": 16 * 64},
    **{f"Switch, {n} experts": {**SWITCH, "experts": n} for n in (4, 16, 64)},
}


def main(arguments=None):
    comparison.main("experts_switch", __doc__, CONTESTANTS, "dense", arguments)


if __name__ == "__main__":
    main()
