import json

from benchmarks.processes import save


def test_save_keeps_other_backends_of_the_same_sizes(tmp_path):
    path = tmp_path / "new" / "step.json"
    save(path, {"k": 2}, "jax", {"seconds": 1})
    results = save(path, {"k": 2}, "torch", {"seconds": 2})
    assert json.loads(path.read_text()) == results
    assert {name: figures["seconds"] for name, figures in results["backends"].items()} == {
        "jax": 1,
        "torch": 2,
    }
    assert set(results["backends"]["jax"]["versions"]) == {"keras", "jax"}


def test_save_drops_figures_of_other_sizes(tmp_path):
    path = tmp_path / "step.json"
    save(path, {"k": 2}, "jax", {"seconds": 1})
    assert list(save(path, {"k": 1}, "torch", {"seconds": 2})["backends"]) == ["torch"]
