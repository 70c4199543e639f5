"""Eight devices against one. Every group of checks is a process, see `tensorflow_checks.py`."""

import keras
import numpy as np
import pytest

from tests.keras_moe.distribution.several import MESH, checked

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's engine", allow_module_level=True)


def test_devices_change_nothing():
    """A mixture of every kind: Switch, top-2 with a capacity and without, expert choice."""
    one, many = checked("curves")["one"], checked("curves")["many"]
    assert len(one["losses"]) == 10
    assert one["losses"][-1] < 0.95 * one["losses"][0]
    compare(many, one)


def compare(many, one):
    for name in ("losses", "evaluated", "predicted"):
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=1e-4, err_msg=name)
    assert one["figures"].keys() == many["figures"].keys()
    for name, value in one["figures"].items():
        np.testing.assert_allclose(many["figures"][name], value, rtol=0, atol=1e-5, err_msg=name)


def test_each_device_has_its_share_of_experts_and_moments():
    shards = checked("curves")["shards"]
    assert len(shards) == 4 * 3 * 4  # two kernels, two biases, and two moments of each
    for path, (total, least, most) in shards.items():
        share = MESH["experts"] * (1 if "bias_out" in path else MESH["model"])
        assert least == most == total // share, path


@pytest.mark.parametrize("case", ["batch", "rest"])
def test_groups_and_batches_that_devices_cannot_share(case):
    """One group of the whole batch; a last batch of 13 sequences, and one of 8, of 8 devices."""
    compare(*reversed(checked("details")[case]))


@pytest.mark.parametrize("case", ["masked", "zoo"])
def test_padding_and_the_zoo(case):
    one, many = checked("details")[case]
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


def test_adafactor_keeps_its_factors_with_their_experts():
    shards = checked("details")["adafactor"]
    factors = {path: sizes for path, sizes in shards.items() if "experts_kernel" in path}
    assert len(factors) > 2
    for path, (total, least, most) in factors.items():
        assert total == 1 or least == most == total // 4, path


def test_a_saved_model_comes_back_on_the_mesh():
    details = checked("details")
    assert details["saved"] == 0
    kernels = [path for path in details["loaded"] if path.endswith("experts/kernel_in")]
    assert kernels
    for path, (total, least, most) in details["loaded"].items():
        assert least == most == total // 4, path


def test_the_table_shows_layouts_and_bytes_per_device():
    lines = checked("details")["table"].splitlines()
    line = next(line for line in lines if line.startswith("top2/experts/kernel_in"))
    # 8 experts of 8 x 16 numbers of 4 bytes, a fourth of them here
    assert " ".join(line.split()[1:]) == "(8, 8, 16) expert, None, model 1,024"


def test_nothing_outlives_the_scope():
    details = checked("details")
    assert details["environment"] == []
    assert details["trainer"] == "TensorFlowTrainer.make_train_function"


def test_a_failure_on_one_device_is_an_error_of_its_step():
    failure = checked("failure")
    assert len(failure["losses"]) == 2
    assert min(failure["losses"]) > 0.1
    assert len(failure["errors"]) == 1
    assert "fails on purpose" in failure["errors"][0]


def test_refusals():
    messages = checked("refusals")
    assert messages["mesh"].startswith("`data * experts * model` must be at most the number of")
    assert messages["experts"].startswith("`experts` of `ExpertParallel` must divide the number")
    assert messages["router"].startswith("`router` must be a SwitchRouter, TopKRouter, ExpertCh")
    assert messages["afterwards"].startswith("A model that was fitted or called within")
    assert "`SoftMoE` must be on one device on TensorFlow" in messages["soft"]
    assert "made within `scope()`. Received: 'switch/experts/kernel_in'" in messages["outside"]
    assert "`generate` must be called outside of `ExpertParallel.scope()`" in messages["writes"]
