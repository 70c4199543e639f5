import json

import pytest

from benchmarks import glue, glue_page
from zoo.tasks import get

TASKS = ("glue/sst2", "glue/cola", "glue/mrpc", "glue/stsb")


def run(task, scores):
    """What is kept of two seeds; the last epoch is 0.1 worse than the best."""
    metrics = get(task).metrics
    runs = [
        {
            "seed": seed,
            "best": dict.fromkeys(metrics, score),
            "last": dict.fromkeys(metrics, score - 0.1),
            "seconds": 1.0,
        }
        for seed, score in enumerate(scores)
    ]
    return {"metrics": metrics, "partial": ["train"] if task == "glue/stsb" else [], "runs": runs}


@pytest.fixture
def kept():
    figures = {"parameters": 2e6, "active_parameters": 1e6, "training_flops_per_token": 6e6}
    settings = {"steps": 40, "steps_per_save": 10, "batch_size": 2, "length": 100}
    losses = {"dense": (5.0, 4.0, 3.5, 3.0), "switch": (4.0, 2.0, 1.9, 1.8)}
    losses["expert_choice"] = (4.8, 3.9, 3.4, 3.1)
    pretraining = {
        f"{model}_mini_en": {
            "settings": settings,
            "figures": figures,
            "history": [[n, 900.0, loss, loss] for n, loss in enumerate(of_model, 1)],
        }
        for model, of_model in losses.items()
    }
    scores = {
        task: {
            "dense-pretrained": run(task, (0.7, 0.71)),
            "switch-pretrained": run(task, (0.8, 0.82)),
            "expert_choice-pretrained": run(task, (0.75, 0.75)),
            **{f"{model}-scratch": run(task, (0.5, 0.6)) for model in glue_page.MODELS},
        }
        for task in TASKS
    }
    words = {
        task: {
            name: {f"val_{metric}": score for metric in get(task).metrics}
            for name, score in (("words", 0.72), ("words and overlap", 0.9))
        }
        for task in TASKS
    }
    return {"pretraining": pretraining, "scores": scores, "words": words}


def test_claims(kept):
    dense, switch, choice, *rest = glue_page.claims(kept)
    head = (
        "pretrained, beats itself from scratch and both bags of words by all metrics of glue/sst2, "
        "glue/cola, glue/mrpc, glue/stsb, glue/qnli: does not hold on "
    )
    assert dense.startswith(f"* `dense`, {head}")
    behind = " (words, words and overlap)"
    assert f": does not hold on glue/sst2 accuracy{behind}, glue/cola matthews{behind}" in dense
    assert f"glue/mrpc f1{behind}" in dense and f"glue/mrpc accuracy{behind}" in dense
    only = " (words and overlap)"
    for claim in (switch, choice):  # 0.81 and 0.75 against 0.72, but by the last epochs less
        best, last = claim.split("; by the last epochs ")
        assert f"does not hold on glue/sst2 accuracy{only}, glue/cola" in best
        assert behind not in best and behind in last
        assert best.endswith("; not measured on glue/qnli")
    fast, slow, *averages = rest
    # From 4.0 at the first checkpoint to 2.0 at the second: 3.0 in the middle, 1.5 of 4.
    assert fast.endswith("in at most 0.7 of its steps: holds (0.38).")
    assert slow.endswith("does not reach the dense twin's last held-out loss.")
    # Seed by seed 0.10 and 0.11 more; over two seeds t = 21, p = 0.030.
    assert averages[0].endswith(
        "average of cola, sst2, mrpc, stsb (partial): holds "
        "(0.810 and 0.705; p = 0.030, seeds that all tasks have: 2; "
        "by the last epochs 0.710 and 0.605)."
    )
    assert averages[2].startswith("* `expert_choice` beats `switch` on GLUE's average of cola, ")
    assert "does not hold" in averages[2]
    superglue = "* `switch` beats `dense` on SuperGLUE's average: not measured."
    assert averages[3] == superglue and len(averages) == 6 + 3 + 2


def test_what_a_bag_of_words_knows_as_well(kept):
    """The better of the two, on all tasks that both were measured on."""
    for task, score in (("glue/sst2", 0.6), ("glue/stsb", 0.71)):
        kept["words"][task]["words and overlap"] = {
            f"val_{metric}": score for metric in get(task).metrics
        }
    *_, dense, switch, choice = glue_page.claims(kept)[:-2]
    behind = "pretrained, is no better than a bag of words, by some metric, on"
    every = "glue/cola, glue/sst2, glue/mrpc, glue/stsb (partial)"
    assert dense == f"* `dense`, {behind} 4 of 4 tasks: {every}."
    assert switch == f"* `switch`, {behind} 2 of 4 tasks: glue/cola, glue/mrpc."
    kept["words"]["glue/mrpc"]["words and overlap"] = {"val_f1": 0.1, "val_accuracy": 0.85}
    kept["words"]["glue/mrpc"]["words"] = {"val_f1": 0.1, "val_accuracy": 0.1}
    *_, switch, choice = glue_page.claims(kept)[:-2]
    assert switch == f"* `switch`, {behind} 2 of 4 tasks: glue/cola, glue/mrpc."  # by accuracy
    kept["words"] = {task: kept["words"][task] for task in ("glue/sst2", "glue/stsb")}
    *_, choice = glue_page.claims(kept)[:-2]
    assert choice == f"* `expert_choice`, {behind} 0 of 2 tasks: none."


def test_published_models_of_like_size(kept):
    kept["scores"]["glue/sst2"]["expert_choice-pretrained"] = run("glue/sst2", (0.831, 0.829))
    del kept["scores"]["glue/cola"], kept["scores"]["glue/stsb"]
    tiny, mini = glue_page.claims(kept)[-2:]
    assert tiny == (
        "* The best twin of each metric and BERT-tiny on GLUE's test sets, which are others: "
        "glue/sst2 accuracy 0.830 < 0.832 (`expert_choice`), "
        "glue/mrpc f1 0.810 < 0.811 (`switch`), glue/mrpc accuracy 0.810 > 0.711 (`switch`)."
    )
    assert "glue/sst2 accuracy 0.830 < 0.859 (`expert_choice`)" in mini


def test_no_more_than_chance_is_not_told_apart(kept):
    """Over two seeds 0.10 and 0.01 more: t = 1.2."""
    for task in TASKS:
        kept["scores"][task]["switch-pretrained"] = run(task, (0.8, 0.72))
    switch = glue_page.claims(kept)[5]
    assert "not told apart (0.760 and 0.705; p = 0." in switch
    for task in TASKS:
        kept["scores"][task]["switch-pretrained"] = run(task, (0.71,))
    switch = glue_page.claims(kept)[5]
    assert "not told apart (0.710 and 0.705; chance not tested" in switch


def test_averages_of_tasks_with_different_seeds(kept):
    """Each task counts with all of its seeds; what is compared by chance are those of all."""
    kept["scores"]["glue/sst2"]["switch-pretrained"] = run("glue/sst2", (0.8, 0.82, 0.9))
    switch = glue_page.claims(kept)[5]
    # (0.84 + 3 x 0.81) / 4
    assert "(0.818 and 0.705; p = 0.030, seeds that all tasks have: 2; " in switch
    kept["scores"]["glue/sst2"]["switch-pretrained"] = run("glue/sst2", (0.84,))
    switch = glue_page.claims(kept)[5]
    assert "(0.818 and 0.705; chance not tested, seeds that all tasks have: 1; " in switch


def test_how_far_apart_twins_may_be(kept):
    """On two tasks of three seeds; gains of 0.1, 0.1 and 0.4 are 0.2 +- 0.1 * 4.303."""
    assert not any(" minus " in claim for claim in glue_page.claims(kept))
    for task in ("glue/cola", "glue/stsb"):
        kept["scores"][task]["switch-pretrained"] = run(task, (0.5, 0.6, 0.9))
        kept["scores"][task]["dense-pretrained"] = run(task, (0.4, 0.5, 0.5))
    (line,) = (claim for claim in glue_page.claims(kept) if " minus " in claim)
    assert line == (
        "* `switch` minus `dense`, averaged over the tasks of GLUE with most seeds (cola, stsb "
        "(partial); 3 in common): +0.200, with 95% confidence from -0.230 to +0.630 (paired "
        "t-test)."
    )
    for task in ("glue/cola", "glue/stsb"):
        kept["scores"][task]["switch-pretrained"] = run(task, (0.4, 0.5, 0.5))
    assert not any(" minus " in claim for claim in glue_page.claims(kept))


def test_a_claim_that_nobody_measured(kept):
    del kept["scores"]["glue/cola"]["switch-scratch"]
    _, switch, *_ = glue_page.claims(kept)
    assert "; not measured on glue/cola, glue/qnli" in switch
    del kept["scores"]["glue/cola"]["dense-scratch"]
    (dense, *_) = glue_page.claims(kept)
    assert "; not measured on glue/cola, glue/qnli" in dense
    kept["scores"] = {}
    assert glue_page.claims(kept)[7].endswith("on GLUE's average: not measured.")


@pytest.mark.parametrize(
    ("losses", "share"),
    [((3.0,), 0.25), ((5.0, 3.0), 0.5), ((5.0, 4.0, 2.0), 0.625), ((4.0,), None)],
)
def test_share_of_steps(losses, share):
    other = [[4, 1.0, 3.0, 3.0]]
    history = [[n, 1.0, loss, loss] for n, loss in enumerate(losses, 1)]
    assert glue_page.share_of_steps(history, other) == share


def test_page_and_picture(kept, tmp_path):
    text = glue_page.page(kept)
    # 40 steps of 2 x 100 tokens in 4 x 900 seconds.
    assert "| dense_mini_en | 2.0M | 1.0M | 6.0M | 40 | 0M | 1.00 | 3.000 | 3.000 | 20.1 |" in text
    assert "| sst2 | accuracy | 2 | 0.720 | 0.900 | 0.550 ± 0.071 (0.450) |" in text
    # 0.8 and 0.82 against 0.7 and 0.71: on average 0.105 more, Holm's p of four tasks alike.
    assert "| sst2 | accuracy | +0.105 (p 0.121) |" in text
    assert "No task has runs of all three yet." in text  # of SuperGLUE
    assert "| stsb (partial) | pearson | 2 | 0.720 |" in text
    glue_page.draw(kept["pretraining"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_words_are_measured_on_all_validation_splits_as_models_are(kept):
    of_words = {"val_accuracy": 0.5, "validation_mismatched_accuracy": 0.6}
    kept["words"]["glue/mnli"] = dict.fromkeys(glue_page.WORDS, of_words)
    assert "| mnli | accuracy | 0 | 0.550 | 0.550 |" in glue_page.page(kept)


def test_the_page_is_of_the_figures_that_are_kept():
    assert glue_page.page(json.loads(glue.KEPT.read_text())) == glue_page.PAGE.read_text()


def test_baselines_alone_tell_that_a_task_is_partial(kept):
    of_words = {name: {"val_accuracy": 0.5} for name in glue_page.WORDS}
    kept["words"]["glue/mnli"] = {**of_words, "partial": ["train"]}
    assert "| mnli (partial) | accuracy | 0 | 0.500 | 0.500 |" in glue_page.page(kept)
