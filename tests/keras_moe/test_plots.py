import builtins

import numpy as np
import pytest

from keras_moe import plots

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def figures():
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


class TestLoad:
    def test_shares_of_each_row(self):
        # Means 2 and 30: 4 / 2 and 0 / 2; 30 / 30 and 30 / 30.
        axes = plots.load({"first": [4, 0], "second": [30, 30]})
        (image,) = axes.images
        np.testing.assert_allclose(image.get_array(), [[2, 0], [1, 1]])
        assert texts_of(axes) == ["2.0", "0.0", "1.0", "1.0"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]

    def test_an_array_and_a_row_without_tokens(self):
        axes = plots.load(np.array([[0, 0, 0], [1, 2, 3]]))
        np.testing.assert_allclose(axes.images[0].get_array(), [[0, 0, 0], [0.5, 1, 1.5]])

    def test_many_experts_have_no_numbers(self):
        assert texts_of(plots.load(np.ones((2, 17)))) == []

    def test_given_axes(self):
        axes = pyplot.figure().subplots()
        assert plots.load(np.ones((2, 2)), axes=axes) is axes


def test_experts_per_token():
    axes = plots.experts_per_token({"switch": [1, 3, 0], "choice": [0, 2, 2]})
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[0.25, 0.75, 0], [0, 0.5, 0.5]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["switch", "choice"]
    assert list(axes.get_xticks()) == [0, 1, 2]


class TestTokens:
    def test_colours_and_numbers(self):
        # Token "b" is shared, 3 : 1, "c" has no expert, and the last weights are padding's.
        weights = [[[0.6, 0], [0.1, 0.3], [0, 0], [0, 0]], [[0, 1], [0, 0], [0, 0], [0, 0]]]
        axes = plots.tokens([["a", "b", "c"], ["$d"]], weights)
        assert texts_of(axes) == ["a", "0", "b", "1·0", "c", "", "$d", "1"]
        alone = plots.tokens([["a", "b"]], np.eye(2)[None])
        first, second = (patch.get_facecolor()[:3] for patch in alone.patches)
        assert first != second
        boxes = [(*patch.get_xy(), patch.get_width()) for patch in axes.patches]
        # A box is 0.4 wider than its token on both sides: 1.8 for a letter, of which 3/4 are 1.35.
        expected = [(-0.4, 0, 1.8), (1.6, 0, 1.35), (2.95, 0, 0.45), (3.6, 0, 1.8), (-0.4, 1, 2.8)]
        np.testing.assert_allclose(boxes, expected)
        colors = [patch.get_facecolor()[:3] for patch in axes.patches]
        grey = [0xE8 / 255] * 3
        np.testing.assert_allclose(colors, [first, second, first, grey, second])
        axes.figure.canvas.draw()  # with the dollar as it is

    def test_long_texts_are_wrapped(self):
        axes = plots.tokens([["ab", "cd", "e"], ["f"]], np.ones((2, 3, 1)), width=5)
        # "ab cd" are five characters.
        places = [patch.get_xy() for patch in axes.patches]
        np.testing.assert_allclose(places, [(-0.4, 0), (2.6, 0), (-0.4, 1), (-0.4, 2)])

    def test_too_few_weights(self):
        message = "`weights`.* 1 .* 2 "
        with pytest.raises(ValueError, match=message):
            plots.tokens([["a", "b"]], np.ones((1, 1, 3)))

    def test_other_texts_than_weights(self):
        message = "`texts`.*`weights`.* 1 .* 2 "
        with pytest.raises(ValueError, match=message):
            plots.tokens([["a"]], np.ones((2, 1, 3)))


def test_without_matplotlib(monkeypatch):
    find = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    message = r"`keras_moe.plots`.*'matplotlib'.*keras-moe\[plots\]"
    with pytest.raises(ImportError, match=message):
        plots.load(np.ones((2, 2)))
