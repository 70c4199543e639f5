import pytest

from zoo.recipes import pairs, preset_recipe


def test_experts_stay_and_want_more_dropout_and_smaller_batches():
    sparse, dense = (preset_recipe("glue/sst2", sparse) for sparse in (True, False))
    assert (sparse["dropout"], sparse["expert_dropout"]) == (0.1, 0.4)  # Switch, Table 4
    assert (dense["dropout"], dense["expert_dropout"]) == (0.1, None)
    assert (sparse["batch_size"], dense["batch_size"]) == (16, 32)  # ST-MoE, section 4.3
    assert (sparse["learning_rate"], dense["learning_rate"]) == (1e-3, 2e-3)  # as was tried
    assert (sparse["train"], dense["train"]) == ("frozen_experts", "all")  # section 4.2
    assert sparse.keys() == dense.keys()


@pytest.mark.parametrize("sparse", [True, False])
def test_small_tasks_have_more_epochs_and_pairs_more_tokens(sparse):
    epochs, lengths = (
        {task: preset_recipe(f"glue/{task}", sparse)[name] for task in ("cola", "rte", "mnli")}
        for name in ("epochs", "max_length")
    )
    assert epochs["mnli"] == 2 < min(epochs["cola"], epochs["rte"])
    assert lengths == {"cola": 64, "rte": 128, "mnli": 128}


def test_texts_of_a_pair_are_read_apart_by_all_layers():
    for task, how in (("glue/cola", None), ("glue/rte", "apart"), ("super_glue/boolq", "apart")):
        assert preset_recipe(task, True)["pairs"] == pairs(task) == how
        assert preset_recipe(task, True)["mix_layers"] == (how == "apart")
