import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, MixtureOfExperts, SwitchRouter, metrics
from keras_moe.surgery import Distiller, copy_weights
from tests import oracle
from tests.backend import numpy

rng = np.random.default_rng(0)
X = rng.normal(size=(6, 4, 3)).astype("float32")
LABELS = rng.integers(0, 5, (6, 4))


def model(sparse, hidden=4):
    """Per token five logits; all but the layer in the middle have the same weights."""
    inputs = keras.Input((None, 3))
    x = keras.layers.Dense(hidden, name="first")(inputs)
    if sparse:
        router = SwitchRouter(exploration="argmax", load_balancing_weight=0.5)
        x = x + MixtureOfExperts(FeedForwardExperts(4, 8), router, name="middle")(x)
    else:
        x = x + keras.layers.Dense(hidden, name="middle")(x)
    return keras.Model(inputs, keras.layers.Dense(5, name="logits")(x))


def embedding_model():
    """Per token five logits, from ids of which 0 is padding."""
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(6, 3, "random_uniform", mask_zero=True)(inputs)
    return keras.Model(inputs, keras.layers.Rescaling(99.0)(keras.layers.Dense(5)(x)))


def hard(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


class TestCopyWeights:
    def test_all_but_the_experts(self):
        teacher, student = model(sparse=True), model(sparse=False)
        report = copy_weights(teacher, student)
        same = ["first/kernel", "first/bias", "logits/kernel", "logits/bias"]
        assert report.copied == same and report.kept == ["middle/kernel", "middle/bias"]
        for name in ("first", "logits"):
            for ours, theirs in zip(
                student.get_layer(name).weights, teacher.get_layer(name).weights, strict=True
            ):
                np.testing.assert_array_equal(numpy(ours), numpy(theirs))

    def test_another_shape_is_kept(self):
        student = model(sparse=False, hidden=6)
        before = [numpy(v) for v in student.weights]
        report = copy_weights(model(sparse=False), student)
        assert report.copied == ["logits/bias"]
        for variable, value in zip(student.weights[:-1], before[:-1], strict=True):
            np.testing.assert_array_equal(numpy(variable), value)

    def test_other_names(self):
        """Two layers may begin with the weights of one."""
        source = model(sparse=False)
        inputs = keras.Input((None, 3))
        x = keras.layers.Dense(4, name="right_first")(inputs)
        x = x + keras.layers.Dense(4, name="left_first")(inputs)
        target = keras.Model(inputs, keras.layers.Dense(5, name="new")(x))
        report = copy_weights(source, target, rename=lambda path: path.partition("_")[2] or path)
        assert report.kept == ["new/kernel", "new/bias"]
        assert report.copied == [
            f"{side}_first/{name}" for side in ("right", "left") for name in ("kernel", "bias")
        ]
        for name in ("right_first", "left_first"):
            for ours, theirs in zip(
                target.get_layer(name).weights, source.get_layer("first").weights, strict=True
            ):
                np.testing.assert_array_equal(numpy(ours), numpy(theirs))

    def test_no_statistics(self):
        teacher, student = model(sparse=True), model(sparse=True)
        teacher(X)
        kept = copy_weights(teacher, student).kept
        assert sorted(kept) == ["middle/expert_tokens", "middle/routing_totals"]
        assert metrics.read(student.get_layer("middle"))["max_share"] == 0

    def test_paths_that_two_weights_share(self):
        def twice():
            inputs = keras.Input((3,))
            inner = keras.Model(inputs, keras.layers.Dense(3, name="a")(inputs))
            return keras.Model(inputs, keras.layers.Dense(3, name="a")(inner(inputs)))

        report = copy_weights(twice(), twice())
        assert report.copied == [] and sorted(report.kept) == ["a/bias"] * 2 + ["a/kernel"] * 2


class TestDistiller:
    @pytest.mark.parametrize(
        ("share", "weighted", "heat"),
        [(0.0, False, 1.0), (0.25, False, 1.0), (0.25, True, 1.0), (1.0, True, 1.0)]
        + [(0.25, True, 3.0)],
    )
    def test_loss_is_the_papers_mixture(self, share, weighted, heat):
        """Of one step of a sparse student; in float64 from the logits of both."""
        student, teacher = model(sparse=True), model(sparse=True)
        distiller = Distiller(student, teacher, share, heat)
        reduction = "mean_with_sample_weight" if weighted else "sum_over_batch_size"
        distiller.compile(keras.optimizers.SGD(0.0), hard(reduction=reduction))
        sample_weight = rng.uniform(size=(6, 4)) if weighted else np.ones((6, 4))

        ours, theirs = (numpy(m(X)).astype("float64") for m in (student, teacher))
        balance = float(ops.convert_to_numpy(sum(student.losses)))  # of the call above
        log_p = np.log(oracle.softmax(ours))
        labels = np.take_along_axis(log_p, LABELS[..., None], axis=-1)[..., 0]
        warm = np.log(oracle.softmax(ours / heat))
        soft = heat**2 * np.sum(oracle.softmax(theirs / heat) * warm, axis=-1)
        mixed = -((1 - share) * labels + share * soft)
        expected = np.sum(sample_weight * mixed) / np.sum(sample_weight) + balance

        arguments = {"sample_weight": sample_weight} if weighted else {}
        loss = distiller.fit(X, LABELS, batch_size=6, verbose=0, **arguments).history["loss"]
        assert loss == pytest.approx([expected], rel=1e-5)

    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_padding_is_in_neither_loss(self, reduction, weighted):
        """Ids of 0 are padding, by the student's embedding; and by the teacher's, were it asked."""
        ids = np.array([[1, 2, 3, 0], [4, 5, 0, 0], [1, 1, 2, 2]])
        student, teacher = embedding_model(), embedding_model()
        distiller = Distiller(student, teacher, 0.25)
        distiller.compile(keras.optimizers.SGD(0.0), hard(reduction=reduction))
        weight = rng.uniform(size=(3, 4)) if weighted else np.ones((3, 4))
        valid = (ids > 0) * weight

        log_p, theirs = (np.log(oracle.softmax(numpy(m(ids)))) for m in (student, teacher))
        labels = np.take_along_axis(log_p, LABELS[:3, :, None], axis=-1)[..., 0]
        mixed = -(0.75 * labels + 0.25 * np.sum(np.exp(theirs) * log_p, axis=-1))
        # Keras: by weights, or else by positions that are none of padding.
        count = valid.sum() if reduction == "mean_with_sample_weight" else (ids > 0).sum()
        expected = np.sum(valid * mixed) / count

        arguments = {"sample_weight": weight} if weighted else {}
        loss = distiller.fit(ids, LABELS[:3], verbose=0, **arguments).history["loss"]
        assert loss == pytest.approx([expected], rel=1e-5)

    def test_the_teacher_runs_as_in_inference(self):
        inputs = keras.Input((None, 3))
        student = keras.Model(inputs, keras.layers.Dense(5)(inputs))
        teacher = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Dropout(0.5)(inputs)))
        distiller = Distiller(student, teacher, teacher_weight=1.0)
        distiller.compile(keras.optimizers.SGD(0.0), hard())
        ours, theirs = (oracle.softmax(numpy(m(X)).astype("float64")) for m in (student, teacher))
        expected = -np.mean(np.sum(theirs * np.log(ours), axis=-1))
        loss = distiller.fit(X, LABELS, batch_size=6, verbose=0).history["loss"]
        assert loss == pytest.approx([expected], rel=1e-5)

    def test_evaluation_is_of_the_student_alone(self):
        student = model(sparse=False)
        distiller = Distiller(student, model(sparse=True))
        distiller.compile(loss=hard(), metrics=["accuracy"])
        student.compile(loss=hard(), metrics=["accuracy"])
        scores = [m.evaluate(X, LABELS, verbose=0) for m in (distiller, student)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-6)
        np.testing.assert_allclose(
            distiller.predict(X, verbose=0), student.predict(X, verbose=0), rtol=1e-6
        )

    @pytest.mark.every_backend
    def test_gradient_is_the_students_alone(self):
        """All of the teacher's share: its logits are what is learnt, whatever the labels say."""
        keras.utils.set_random_seed(0)
        student, teacher = model(sparse=False), model(sparse=True)
        teacher.get_layer("logits").kernel.assign(2 * rng.normal(size=(4, 5)))
        before = [numpy(v) for v in teacher.variables]
        copy_weights(teacher, student)
        distiller = Distiller(student, teacher, teacher_weight=1.0)
        distiller.compile(keras.optimizers.Adam(0.02), hard())

        def difference():
            p, q = (oracle.softmax(m.predict(X, verbose=0)) for m in (student, teacher))
            return np.abs(p - q).max()

        first = difference()
        distiller.fit(X, LABELS, batch_size=6, epochs=60, verbose=0)
        assert difference() < 0.3 * first
        for variable, value in zip(teacher.variables, before, strict=True):
            if variable.name not in metrics.statistics_shapes(1):
                np.testing.assert_array_equal(numpy(variable), value)

    def test_the_teacher_is_left_as_it_was(self):
        """And can be trained afterwards; a layer that both have is the student's to train."""
        shared = keras.layers.Dense(3, name="shared")
        inputs = keras.Input((None, 3))
        student, teacher = (
            keras.Model(inputs, keras.layers.Dense(5, name=name)(shared(inputs)))
            for name in ("student", "teacher")
        )
        before = {v.path: numpy(v) for v in teacher.weights}
        distiller = Distiller(student, teacher, teacher_weight=1.0)
        assert {v.path for v in distiller.trainable_weights} == {v.path for v in student.weights}
        assert [v.path for v in distiller.non_trainable_weights] == [
            "teacher/kernel",
            "teacher/bias",
        ]
        distiller.compile(keras.optimizers.Adam(0.02), hard())
        distiller.fit(X, LABELS, verbose=0)
        assert teacher.trainable and len(teacher.trainable_variables) == 4
        for variable in teacher.weights:
            same = (numpy(variable) == before[variable.path]).all()
            assert same == variable.path.startswith("teacher"), variable.path
        teacher.compile(keras.optimizers.Adam(0.02), hard())
        teacher.fit(X, LABELS, verbose=0)
        assert (numpy(teacher.weights[-1]) != before["teacher/bias"]).any()

    def test_what_the_user_froze_stays_frozen(self):
        student, teacher = model(sparse=False), model(sparse=True)
        student.get_layer("first").trainable = False
        distiller = Distiller(student, teacher)
        names = [v.path for v in distiller.trainable_variables]
        assert names == ["middle/kernel", "middle/bias", "logits/kernel", "logits/bias"]
        assert Distiller(student, teacher, trainable=False).trainable_weights == []

    def test_no_gradient_goes_through_a_shared_layer_by_way_of_the_teacher(self):
        """Of the soft loss alone, by central differences of its formula with fixed targets."""
        inputs = keras.Input((None, 3))
        shared = keras.layers.Dense(5, use_bias=False)
        student, teacher = (
            keras.Model(inputs, keras.layers.Rescaling(scale)(shared(inputs))) for scale in (1, 3)
        )
        kernel = numpy(shared.kernel).astype("float64")
        targets = oracle.softmax(3 * (X.astype("float64") @ kernel))

        def soft_loss():
            return -np.mean(np.sum(targets * np.log(oracle.softmax(X @ kernel)), axis=-1))

        slope = oracle.gradient(soft_loss, [kernel])[0]
        distiller = Distiller(student, teacher, teacher_weight=1.0)
        distiller.compile(keras.optimizers.SGD(1.0), hard())
        distiller.fit(X, LABELS, batch_size=6, verbose=0)
        np.testing.assert_allclose(numpy(shared.kernel), kernel - slope, rtol=1e-4, atol=1e-5)

    def test_comes_back_and_trains_on(self, tmp_path):
        distiller = Distiller(model(sparse=False), model(sparse=True), 0.5, 2.0)
        distiller.compile("adam", hard())
        distiller.fit(X, LABELS, verbose=0)
        distiller.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert (loaded.teacher_weight, loaded.temperature) == (0.5, 2.0)
        for part in ("student", "teacher"):
            ours, theirs = (numpy(getattr(m, part)(X)) for m in (loaded, distiller))
            np.testing.assert_array_equal(ours, theirs)
        assert np.isfinite(loaded.fit(X, LABELS, verbose=0).history["loss"][0])

    @pytest.mark.parametrize("share", [-0.1, 1.5])
    def test_share_out_of_range(self, share):
        with pytest.raises(ValueError, match=f"`teacher_weight`.*teacher_weight={share}"):
            Distiller(model(sparse=False), model(sparse=True), share)

    @pytest.mark.parametrize("heat", [0.0, -1.0])
    def test_temperature_out_of_range(self, heat):
        with pytest.raises(ValueError, match=f"`temperature`.*temperature={heat}"):
            Distiller(model(sparse=False), model(sparse=True), temperature=heat)

    @pytest.mark.parametrize("last", [keras.layers.Dense(2, "softmax"), keras.layers.Softmax()])
    def test_probabilities_instead_of_logits(self, last):
        ends = keras.Sequential([keras.Input((3,)), last])
        logits = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        with pytest.raises(ValueError, match="`student`.*softmax"):
            Distiller(ends, logits)
        with pytest.raises(ValueError, match="`teacher`.*softmax"):
            Distiller(logits, ends)
        inputs = keras.Input((3,))
        with pytest.raises(ValueError, match="`teacher`.*softmax"):
            Distiller(logits, keras.Model(inputs, ends(inputs)))
        # A softmax that is not the last layer is none of its business.
        Distiller(keras.Model(inputs, keras.layers.Dense(2)(ends(inputs))), logits)

    def test_classes_differ(self):
        two, three = (keras.Sequential([keras.Input((3,)), keras.layers.Dense(n)]) for n in (2, 3))
        distiller = Distiller(two, three)
        distiller.compile(loss=hard(), run_eagerly=True)
        with pytest.raises(ValueError, match="`student`.*`teacher`.* 2 .* 3 "):
            distiller.fit(X[:, 0], LABELS[:, 0] % 2, verbose=0)

    def test_one_logit(self):
        one = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        distiller = Distiller(one, keras.models.clone_model(one))
        distiller.compile(loss="mse", run_eagerly=True)
        with pytest.raises(ValueError, match=r"`student`.*\(\d+, 1\)"):
            distiller.fit(X[:, 0], np.ones((6, 1)), verbose=0)
