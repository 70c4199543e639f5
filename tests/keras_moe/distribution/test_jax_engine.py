"""Eight devices against one. Every group of checks is a process, see `jax_checks.py`."""

import re

import keras
import numpy as np
import pytest

from tests.keras_moe.distribution.several import MESH, checked

if keras.backend.backend() != "jax":
    pytest.skip("JAX's engine", allow_module_level=True)

KINDS = ("switch", "top2", "choice")


@pytest.mark.parametrize("kind", KINDS)
def test_devices_do_not_change_the_losses(kind):
    one, many = (checked("curves")[kind][name] for name in ("one", "many"))
    assert len(one["losses"]) == 20
    assert one["losses"][-1] < 0.7 * one["losses"][0]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(many["evaluated"], one["evaluated"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_devices_do_not_change_figures_and_auxiliary_losses(kind):
    one, many = (checked("curves")[kind][name] for name in ("one", "many"))
    assert one["figures"].keys() == many["figures"].keys()
    assert len(one["figures"]) > 10
    for name, value in one["figures"].items():
        np.testing.assert_allclose(many["figures"][name], value, rtol=0, atol=1e-5, err_msg=name)
    assert one["auxiliary"] > 0
    np.testing.assert_allclose(many["auxiliary"], one["auxiliary"], rtol=0, atol=1e-5)


def test_each_device_has_its_share_of_experts_and_moments():
    shards = checked("curves")["switch"]["shards"]
    # Kernels and biases of three layers, one of them gated, and two moments of each.
    assert len(shards) == 3 * (4 + 5 + 4)
    for path, (total, least, most) in shards.items():
        share = MESH["experts"] * (1 if "bias_out" in path else MESH["model"])
        assert least == most == total // share, path


def test_only_slots_travel():
    """Of a train step on data 1 x expert 8, whatever grows with the tokens.

    16 sequences more are 16 * 32 / 8 = 64 tokens more per device, of 64 numbers of 4 bytes. Three
    mixtures send them to 1 * 1.25, 2 * 1.25 and 2 experts each (groups of 32 tokens: 5, 10 and 8
    slots in each of 8 experts, nothing rounded), there and back, forward and backward.
    """
    few, many = (checked("traffic")[batch] for batch in ("16", "32"))
    growth = {name: many[name] - few[name] for name in few}
    ideal = 4 * 64 * (1.25 + 2.5 + 2.0) * 64 * 4
    assert growth.pop("all-to-all") == ideal
    assert set(growth.values()) == {0}
    assert sum(many.values()) > 0


def test_the_rest_of_an_epoch():
    one, many = checked("details")["rest_of_an_epoch"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(many["evaluated"], one["evaluated"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(many["predicted"], one["predicted"], rtol=0, atol=1e-4)
    assert len(many["predicted"]) == 10


def test_other_banks_of_experts():
    checks = checked("details")["other_banks"]
    one, many = checks["losses"]
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)
    assert len(checks["shards"]) == 3 * (1 + 2 + 2)
    for path, (total, least, most) in checks["shards"].items():
        assert least == most == total // 4, path


def test_bfloat16():
    checks = checked("details")["in_bfloat16"]
    assert max(checks["differences"]) < 2**-7
    assert checks["dtype"] == "bfloat16"


def test_batch_by_batch():
    one, many = checked("details")["batch_by_batch"]
    assert one[2] < one[0]
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)


def test_weights_made_late_and_moments_in_factors():
    late = checked("details")["late"]
    assert late["losses"][-1] < late["losses"][0]
    assert len(late["shards"]) == 2 + 4
    for path, (total, least, most) in late["shards"].items():
        assert least == most == total // 4, path
    # 8 * 16 * 32 numbers of 4 bytes on 4 devices; rows 8 * 16.
    lines = {line.split()[0]: line.split()[-1] for line in late["table"].splitlines()}
    assert lines["late/moe/experts/kernel_in"] == "4,096"
    assert lines["adafactor/late_moe_experts_kernel_in_rows"] == "128"
    assert lines["late/out/kernel"] == "256"
    assert late["table"].split()[:4] == ["weight", "shape", "layout", "bytes"]


def test_devices_drop_different_hidden_units():
    """Kernels of ones: a token is 16 in, and half of 16 / (1 - 0.5) out for each unit kept."""
    kept = np.array(checked("details")["dropped_units"]) / 16
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    assert len(set(kept.round())) > 3  # of 8 tokens
    assert 48 < kept.mean() < 80  # of 64 units of either expert


def test_a_language_model_of_the_zoo():
    checks = checked("language_model")
    one, many = checks["one"], checks["many"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-4)
    assert many["losses"][-1] < 0.8 * many["losses"][0]
    assert many["written"] == one["written"]
    assert max(checks["reloaded"]) < 1e-4
    lines = {line.split()[0]: line for line in checks["table"].splitlines()}
    assert "None, model" in lines["block_1/attention/query/kernel"]
    assert "model, None" in lines["block_1/attention/output/kernel"]
    assert "replicated" in lines["block_1/attention_norm/scale"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("mesh", "must be at most the number of devices, 8.*a mesh of 16"),
        ("experts", "`experts` of `ExpertParallel` must divide.*6 experts of the layer 'moe'"),
        ("hidden", "`model` of `ExpertParallel` must divide.*hidden_dim=9 in the layer 'moe'"),
        ("layers", "`experts` must have all kernels.*LayerExperts in the layer 'moe'"),
        ("fitted", "must be shared by the devices.*'moe_0/experts/kernel_in'.*not 1/8"),
        ("activity", "`activity_regularizer` of experts must be None on a mesh.*of 'bank'"),
        ("idle", "`experts \\* model` must divide the number of devices.*experts=3, model=1 for 8"),
        ("outside", "must be shared by the devices.*'moe_0/experts/kernel_in'.*not 1/8"),
    ],
)
def test_refusals(name, said):
    assert re.search(said, checked("details")["refusals"][name])


def test_the_data_axis_takes_what_is_left():
    assert checked("details")["refusals"]["devices"] == [2, 3]
