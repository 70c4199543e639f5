"""The sizes of the zoo's models, without memory for their weights.

python -m benchmarks.parameters
"""

import zoo
from benchmarks.tables import markdown
from zoo.models.deferred import Deferred

MODELS = [
    *((zoo.dense_transformer, size, None, {}) for size in ("small", "base", "large", "xl", "xxl")),
    *((zoo.switch_transformer, "base", experts, {}) for experts in (8, 16, 32, 64, 128, 256)),
    *((zoo.switch_transformer, size, None, {}) for size in ("large", "xl", "xxl", "c-2048")),
    (zoo.expert_choice_transformer, "base", 64, {}),
    *(
        (zoo.expert_choice_transformer, size, None, {"architecture": "decoder"})
        for size in ("100m", "8b")
    ),
]


def main():
    rows = []
    for build, size, num_experts, options in MODELS:
        if num_experts is not None:
            options = {"num_experts": num_experts, **options}
        with Deferred():
            figures = zoo.figures(build(size, **options))
        arguments = [repr(size), *(f"{name}={value!r}" for name, value in options.items())]
        rows.append(
            [
                f"`{build.__name__}({', '.join(arguments)})`",
                f"{figures.parameters:,}",
                f"{figures.active_parameters / 1e6:,.0f}M",
                f"{figures.training_flops_per_token / 1e9:,.2f}",
            ]
        )
    print(markdown(["model", "parameters", "active", "training GFLOPs per token"], rows))


if __name__ == "__main__":
    main()
