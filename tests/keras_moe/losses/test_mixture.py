import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import losses
from tests import oracle
from tests.backend import gradients, numpy

pytestmark = pytest.mark.every_backend

E, D = 3, 2  # experts, outputs of each
FORMS = ("mixture", "cooperative", "competitive", "classification")
rng = np.random.default_rng(0)
OUTPUTS = rng.normal(size=(4, 5, E, D))
LOGITS = rng.normal(size=(4, 5, E))
PACKED = np.concatenate([OUTPUTS, LOGITS[..., None]], axis=-1)
TARGETS = {
    **dict.fromkeys(FORMS, rng.normal(size=(4, 5, D)).astype("float32")),
    "classification": rng.integers(0, D, (4, 5)),
}


def expected(form):
    """The loss of every case, `[4, 5]`."""
    cases = np.ndindex(4, 5)
    values = [oracle.mixture_loss(form, TARGETS[form][c], OUTPUTS[c], LOGITS[c]) for c in cases]
    return np.reshape(values, (4, 5))


def each(form, y_true, packed):
    """The loss of every case, as the class gives it."""
    loss = losses.MixtureOfExpertsLoss(form, reduction=None)
    return numpy(loss(np.asarray(y_true), np.asarray(packed, "float32")))


def gradient(form, y_true, packed):
    """Of the sum of the cases' losses, by what is packed."""
    loss = losses.MixtureOfExpertsLoss(form, reduction="sum")
    layer = keras.layers.Lambda(lambda packed: loss(y_true, packed))
    layer.build(packed.shape)
    return gradients(layer, packed, 1.0)[0]


class TestLoss:
    @pytest.mark.parametrize("form", FORMS)
    def test_is_the_equation(self, form):
        np.testing.assert_allclose(each(form, TARGETS[form], PACKED), expected(form), rtol=1e-5)

    @pytest.mark.parametrize("form", FORMS)
    def test_gradient(self, form):
        packed = PACKED[0, 0].copy()

        def loss():
            target = TARGETS[form][0, 0]
            return oracle.mixture_loss(form, target, packed[:, :-1], packed[:, -1])

        ours = gradient(form, TARGETS[form][:1, 0], packed[None])
        np.testing.assert_allclose(ours[0], oracle.gradient(loss, [packed])[0], atol=1e-5)

    def test_by_hand(self):
        # Proportions 3/4 and 1/4, outputs 0 and 4, target 2: both are at distance 4.
        packed = [[[0.0, np.log(3.0)], [4.0, 0.0]]]
        target = np.array([[2.0]], "float32")
        assert each("mixture", target, packed) == pytest.approx(2)  # -log exp(-4 / 2)
        assert each("cooperative", target, packed) == pytest.approx(1)  # (2 - 4/4)^2
        assert each("competitive", target, packed) == pytest.approx(4)
        # Logits of two classes: log-odds 0 and log 3 for class 1, 3/4 * 1/2 + 1/4 * 3/4 = 9/16.
        packed = [[[0.0, 0.0, np.log(3.0)], [0.0, np.log(3.0), 0.0]]]
        assert each("classification", np.array([1]), packed) == pytest.approx(-np.log(9 / 16))

    @pytest.mark.parametrize("form", ["mixture", "classification"])
    def test_finite_far_away(self, form):
        """Squared distances of 2000 and 2100, or logits as far apart: exp would give 0."""
        if form == "mixture":
            target = np.zeros((1, 1), "float32")
            packed = np.array([[[np.sqrt(2000.0), 0.0], [np.sqrt(2100.0), 0.0]]])
            value = 1000 + np.log(2)
        else:
            target = np.array([0])
            packed = np.array([[[0.0, 1000.0, 0.0], [0.0, 1050.0, 0.0]]])
            value = 1000 + np.log(2)
        assert each(form, target, packed) == pytest.approx(value, rel=1e-6)
        slope = gradient(form, target, packed)[0]
        assert np.isfinite(slope).all()
        # The nearer expert alone is answerable, and is moved.
        assert abs(slope[0, 0]) > 0.9 and abs(slope[1, 0]) < 1e-6
        np.testing.assert_allclose(slope[:, -1], [-0.5, 0.5], rtol=1e-5)  # p - h

    def test_one_expert_is_least_squares(self):
        # 1/2 |(1, 2) - (4, 6)|^2 = 25/2, and the gate has nothing to say.
        packed = np.array([[[4.0, 6.0, 7.0]]])
        target = np.array([[1.0, 2.0]], "float32")
        assert each("mixture", target, packed) == pytest.approx(12.5)
        np.testing.assert_allclose(gradient("mixture", target, packed), [[[3, 4, 0]]], atol=1e-6)

    def test_a_label_that_is_no_class(self):
        labels = TARGETS["classification"].copy()
        labels[0, 0], labels[1, 1] = -1, D
        wrong = np.isnan(each("classification", labels, PACKED))
        assert wrong[0, 0] and wrong[1, 1] and wrong.sum() == 2

    def test_one_output_without_an_axis(self):
        target, packed = TARGETS["mixture"][..., 0], PACKED[..., 1:]
        for form in FORMS[:3]:
            with_axis = each(form, target[..., None], packed)
            np.testing.assert_array_equal(each(form, target, packed), with_axis)
        labels = TARGETS["classification"]
        with_axis = each("classification", labels[..., None], PACKED)
        np.testing.assert_array_equal(each("classification", labels, PACKED), with_axis)

    def test_reduction_and_weights(self):
        loss = losses.MixtureOfExpertsLoss()
        each = expected("mixture")
        assert float(loss(TARGETS["mixture"], PACKED)) == pytest.approx(each.mean(), rel=1e-5)
        weight = np.arange(20.0).reshape(4, 5)
        weighted = float(loss(TARGETS["mixture"], PACKED, sample_weight=weight))
        assert weighted == pytest.approx((each * weight).mean(), rel=1e-5)

    def test_padding_is_not_counted(self):
        mask = np.arange(20).reshape(4, 5) % 3 > 0
        masked = keras.layers.Lambda(lambda x: x, mask=ops.convert_to_tensor(mask))
        packed = masked(ops.convert_to_tensor(PACKED, "float32"))
        loss = float(losses.MixtureOfExpertsLoss()(TARGETS["mixture"], packed))
        assert loss == pytest.approx(expected("mixture")[mask].mean(), rel=1e-5)

    def test_float32_whatever_is_packed(self):
        loss = losses.MixtureOfExpertsLoss(reduction=None)
        # 256 + 1 is 256 in bfloat16; 1/2 * 257^2
        packed = losses.pack(ops.cast([[[-256.0]]], "bfloat16"), ops.cast([[0.0]], "bfloat16"))
        value = loss(np.ones((1, 1), "float32"), packed)
        for made in (packed, value):
            assert keras.backend.standardize_dtype(made.dtype) == "float32"
        assert numpy(value) == pytest.approx(257**2 / 2)

    def test_config_round_trip(self):
        made = losses.MixtureOfExpertsLoss("competitive", reduction="sum", name="mine")
        copy = keras.losses.deserialize(keras.losses.serialize(made))
        assert isinstance(copy, losses.MixtureOfExpertsLoss)
        assert copy.get_config() == made.get_config()
        assert (copy.form, copy.reduction, copy.name) == ("competitive", "sum", "mine")

    def test_errors(self):
        with pytest.raises(ValueError, match="`form`.*form='soft'"):
            losses.MixtureOfExpertsLoss("soft")
        for shape in ((4, 5, 1), (4, 5), (4, 5, 1, D)):
            for form in FORMS[:3]:
                with pytest.raises(ValueError, match=r"`y_true`.*y_true.*\(4, 5, 1"):
                    each(form, np.zeros(shape), PACKED)
        for shape in ((4, 5, D), (4,)):
            message = f"`y_true`.*'classification'.*{re.escape(str(shape))}"
            with pytest.raises(ValueError, match=message):
                each("classification", np.zeros(shape), PACKED)


class TestResponsibilities:
    def test_by_hand(self):
        # Equal proportions, squared distances 0 and 2 log 3: 1 to 1/3.
        packed = [[[0.0, 0.0], [np.sqrt(2 * np.log(3.0)), 0.0]]]
        h = numpy(losses.responsibilities(np.zeros((1, 1)), np.array(packed)))
        np.testing.assert_allclose(h, [[0.75, 0.25]], rtol=1e-6)
        # Proportions 1/4 and 3/4, probabilities of class 0 1/2 and 1/4: 2/16 to 3/16.
        packed = [[[0.0, 0.0, 0.0], [0.0, np.log(3.0), np.log(3.0)]]]
        h = numpy(losses.responsibilities(np.zeros(1), np.array(packed), classification=True))
        np.testing.assert_allclose(h, [[0.4, 0.6]], rtol=1e-6)

    @pytest.mark.parametrize("form", ["mixture", "classification"])
    def test_sum_to_one_and_are_the_gate_s_gradient(self, form):
        """By the gate's logits Eq. 3 has the gradient `p - h`."""
        target, packed = TARGETS[form].reshape(20, -1), PACKED.reshape(20, E, D + 1)
        h = numpy(losses.responsibilities(target, packed, form == "classification"))
        np.testing.assert_allclose(h.sum(axis=-1), np.ones(20), rtol=1e-6)
        slope = gradient(form, target, packed)[..., -1]
        np.testing.assert_allclose(slope, oracle.softmax(packed[..., -1]) - h, atol=1e-6)

    def test_eq_5(self):
        """By an expert's output Eq. 3 has the gradient `-h (d - o)`."""
        target, packed = TARGETS["mixture"].reshape(20, D), PACKED.reshape(20, E, D + 1)
        h = numpy(losses.responsibilities(target, packed))
        slope = gradient("mixture", target, packed)[..., :-1]
        expected = -h[..., None] * (target[:, None] - packed[..., :-1])
        np.testing.assert_allclose(slope, expected, atol=1e-6)

    def test_the_best_expert_is_moved_fastest_by_eq_3_and_slowest_by_eq_2(self):
        """The paper's argument for Eq. 3: equal proportions, all experts farther off than 1."""
        distance = np.array([1.5, 2.0, 3.0])
        packed = np.stack([distance, np.zeros(3)], axis=-1)[None]
        slope_2, slope_3 = (
            gradient(form, np.zeros((1, 1), "float32"), packed)[0, :, 0]
            for form in ("competitive", "mixture")
        )
        np.testing.assert_allclose(slope_2, 2 / 3 * distance, rtol=1e-5)  # Eq. 4
        assert (np.diff(slope_2) > 0).all() and (np.diff(slope_3) < 0).all()


class TestBlend:
    def test_by_hand(self):
        # 3/4 * (1, 2) + 1/4 * (5, -2)
        packed = np.array([[[1.0, 2.0, np.log(3.0)], [5.0, -2.0, 0.0]]])
        np.testing.assert_allclose(numpy(losses.blend(packed)), [[2, 1]], rtol=1e-6)

    def test_of_classes_is_one_of_probabilities(self):
        # 3/4 * (1/2, 1/2) + 1/4 * (1/4, 3/4), not the softmax of blended logits
        packed = np.array([[[0.0, 0.0, np.log(3.0)], [0.0, np.log(3.0), 0.0]]])
        blend = numpy(losses.blend(packed, classification=True))
        np.testing.assert_allclose(blend, [[7 / 16, 9 / 16]], rtol=1e-6)

    def test_unpack_is_the_inverse_of_pack(self):
        outputs, logits = OUTPUTS.astype("float32"), LOGITS.astype("float32")
        packed = losses.pack(outputs, logits)
        assert packed.shape == (4, 5, E, D + 1)
        for theirs, ours in zip(losses.unpack(packed), (outputs, logits), strict=True):
            np.testing.assert_array_equal(numpy(theirs), ours)
