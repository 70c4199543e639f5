import numpy as np
import pytest

from benchmarks.tables import base_of, drawn, markdown, mean_sd, print_tables, ratio


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("switch", "dense"),
        ("switch, bare", "dense"),
        ("one-hot Switch", "dense"),
        ("dense", "dense"),
        ("top-8", "dense of top-8"),
        ("top-8, bare", "dense of top-8"),
        ("dense of top-8", "dense of top-8"),
        ("top-2, gated", "dense of top-2, gated"),
        ("KerasHub Mixtral", "dense of top-2, gated"),
        ("dense of top-2, gated", "dense of top-2, gated"),
        ("switch, batch of 16", "dense, batch of 16"),
        ("dense, batch of 16", "dense, batch of 16"),
    ],
)
def test_base_of(name, base):
    assert base_of(name) == base


def test_ratio_is_taken_round_by_round():
    # 2/1, 6/2, 4/4 are 2, 3, 1; the ratio of the medians would be 4/2 = 2 with no spread.
    seconds = {"moe": [2.0, 6.0, 4.0], "dense": [1.0, 2.0, 4.0]}
    np.testing.assert_allclose(ratio(seconds, "moe", "dense"), [1.5, 2.0, 2.5])


def test_ratio_in_the_rounds_that_both_ran():
    # 10/1 and 30/2; the third round of the base has no partner.
    seconds = {"slow": [10.0, 30.0], "dense": [1.0, 2.0, 50.0]}
    np.testing.assert_allclose(ratio(seconds, "slow", "dense"), [11.25, 12.5, 13.75])


def test_ratio_without_what_is_not_its_own():
    # (3 - 1)/4 and (4 - 1)/4
    seconds = {"part": [3.0, 4.0], "frame": [1.0, 1.0], "whole": [4.0, 4.0]}
    quartiles = ratio(seconds, "part", "whole", without="frame")
    np.testing.assert_allclose(quartiles, [0.5625, 0.625, 0.6875])


def test_table_of_a_step(capsys):
    seconds = {
        **{"dense/8": [1.0, 1.0], "switch/8": [1.0, 1.2]},
        **{"dense/32": [2.0, 2.0], "switch/32": [3.0, 3.0]},
    }
    print_tables("step", "jax", seconds)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "step, jax: relative to the dense layer of the same active FLOPs",
        "",
        "| | 8 experts | 32 experts |",
        "|---|---|---|",
        "| switch | 1.10 (1.05-1.15) | 1.50 (1.50-1.50) |",
    ]


def test_generation_is_also_relative_to_the_fewest_experts(capsys):
    seconds = {
        **{"dense, batch of 1/8": [1.0], "switch, batch of 1/8": [2.0]},
        **{"dense, batch of 1/128": [1.0], "switch, batch of 1/128": [3.0]},
    }
    print_tables("generation", "jax", seconds)
    printed = capsys.readouterr().out
    assert "| switch, batch of 1 | 2.00 (2.00-2.00) | 3.00 (3.00-3.00) |" in printed
    _, _, growth = printed.partition("generation, jax: relative to 8 experts")
    assert "| switch, batch of 1 | 1.00 (1.00-1.00) | 1.50 (1.50-1.50) |" in growth


def test_parts_are_shares_of_the_step(capsys):
    times = {
        "switch": 10.0,
        "switch, frame": 1.0,
        "switch, bare": 9.5,
        "switch, frame of bare": 1.5,
        "switch, routing": 1.5,
        "switch, routing and metrics": 1.7,
        "switch, no experts": 2.1,
    }
    print_tables("parts", "jax", {f"{name}/8": [time] for name, time in times.items()})
    assert capsys.readouterr().out.splitlines()[5:] == [
        "| switch: frame | 0.10 (0.10-0.10) |",  # 1/10
        "| switch: products | 0.80 (0.80-0.80) |",  # (9.5 - 1.5)/10
        "| switch: routing | 0.05 (0.05-0.05) |",  # (1.5 - 1)/10
        "| switch: metrics | 0.02 (0.02-0.02) |",  # (1.7 - 1.5)/10
        "| switch: dispatch and combine | 0.04 (0.04-0.04) |",  # (2.1 - 1.7)/10
        "| switch: routing, dispatch, combine, metrics | 0.11 (0.11-0.11) |",  # (2.1 - 1)/10
    ]


def test_markdown():
    table = markdown(["", "epochs"], [["BP 6", 12], ["", 0]])
    assert table.splitlines() == ["| | epochs |", "|---|---|", "| BP 6 | 12 |", "| | 0 |"]


def test_mean_and_sample_standard_deviation():
    # 1, 3: mean 2, variance (1 + 1) / (2 - 1)
    assert mean_sd([1, 3]) == "2 ± 1"
    assert mean_sd([1, 3], digits=2) == "2.00 ± 1.41"


def test_drawn(tmp_path):
    with drawn(tmp_path / "figure.png", 2, figsize=(2, 1)) as panels:
        panels[1].plot([0, 1])
        assert len(panels) == 2 and not (tmp_path / "figure.png").exists()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
