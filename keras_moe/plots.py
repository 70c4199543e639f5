"""Pictures of routings: who has how much to do, who reads what, and how many read a token.

They take the numbers that `keras_moe.metrics` makes of the routings of a model, and need the extra
`plots`, matplotlib. Each returns the matplotlib axes that it drew on.
"""

import numpy as np

FAINT = "#e8e8e8"


def load(loads, axes=None):
    """Heat map of the experts' loads, one row for each layer, or for each moment of a training.

    Example:

    ```python
    routings = keras_moe.routings(model, x[:64])
    keras_moe.plots.load({n: keras_moe.metrics.expert_tokens(r) for n, r in routings.items()})
    ```

    Args:
        loads: dictionary from the name of a row to `[experts]` numbers, as
            `keras_moe.metrics.expert_tokens` counts them, or an array of `[rows, experts]`.
        axes: matplotlib axes to draw on; `None` makes a figure.

    Returns:
        The axes. A colour is a load relative to the fair share of its row: 1 if all experts had the
        same.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    axes = _axes(axes, (7, 3))
    if not isinstance(loads, dict):
        loads = dict(enumerate(loads))
    load_RE = np.stack([np.asarray(row, "float64") for row in loads.values()])
    share_RE = load_RE / np.maximum(load_RE.mean(axis=1, keepdims=True), 1e-30)
    rows, experts = share_RE.shape
    image = axes.imshow(share_RE, cmap="PuOr_r", vmin=0, vmax=2, aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="load / fair share", extend="max")
    if experts <= 16 and rows <= 16:
        for (row, expert), share in np.ndenumerate(share_RE):
            color = "white" if abs(share - 1) > 0.7 else "black"
            axes.text(expert, row, f"{share:.1f}", ha="center", va="center", color=color)
        axes.set_xticks(range(experts))
        axes.set_yticks(range(rows), loads)
    axes.set(xlabel="expert")
    return axes


def experts_per_token(histograms, axes=None):
    """Bars: the share of the tokens that are served by 0, 1, ... experts.

    Args:
        histograms: dictionary from a name to numbers of tokens, as
            `keras_moe.metrics.experts_per_token_histogram` counts them.
        axes: matplotlib axes to draw on; `None` makes a figure.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    axes = _axes(axes, (6, 3))
    counts = {name: np.asarray(counts, "float64") for name, counts in histograms.items()}
    width = 0.8 / len(counts)
    for i, (name, tokens) in enumerate(counts.items()):
        place = np.arange(len(tokens)) + (i - (len(counts) - 1) / 2) * width
        axes.bar(place, tokens / tokens.sum(), width, label=name)
    most = max(int(np.flatnonzero(tokens).max()) for tokens in counts.values())
    axes.set_xticks(range(most + 1))
    axes.set(xlabel="experts per token", ylabel="share of the tokens", xlim=(-0.6, most + 0.6))
    axes.legend(frameon=False)
    return axes


def tokens(texts, weights, width=80, axes=None):
    """Texts whose tokens have the colours of the experts that serve them.

    Below each token are the numbers of its experts, the one with the largest weight first. Where
    there are several, the token's background is divided as their weights are; it is grey where
    there is none. With more than ten experts colours repeat, and the numbers tell them apart.

    Example:

    ```python
    routing = keras_moe.routings(model, inputs)["moe"]  # of a layer with group="sequence"
    keras_moe.plots.tokens(texts, keras_moe.metrics.expert_weights(routing))
    ```

    Args:
        texts: list of texts, each a list of its tokens as strings.
        weights: for each text `[length, experts]` numbers, `keras_moe.metrics.expert_weights`, say,
            reshaped to the shape of the batch; those after a text's last token are left out.
        width: characters of a line.
        axes: matplotlib axes to draw on, whose font size is chosen for their width; `None` makes a
            figure.

    Returns:
        The axes.

    Raises:
        ValueError: if a text has more tokens than weights.
        ImportError: if matplotlib is not installed.
    """
    placed, lines = _placed(texts, weights, width)
    axes = _axes(axes, (10, 0.4 * lines))
    inches = axes.get_window_extent().width / axes.figure.dpi
    size = 72 * inches / width / 0.602  # what the font's letters are wide, of their height
    from matplotlib.patches import Rectangle

    palette = _palette()
    for line, place, token, weight_E in placed:
        order = np.argsort(-weight_E, kind="stable")[: np.count_nonzero(weight_E)]
        parts = [(weight_E[e] / weight_E.sum(), palette[e % len(palette)]) for e in order]
        left, span = place - 0.4, len(token) + 0.8
        for share, color in parts or [(1, FAINT)]:
            axes.add_patch(Rectangle((left, line), share * span, 0.6, color=color, linewidth=0))
            left += share * span
        middle = place + len(token) / 2
        options = {"ha": "center", "va": "center", "family": "monospace"}
        axes.text(middle, line + 0.3, token, size=size, parse_math=False, **options)
        numbers = "·".join(map(str, order))
        axes.text(middle, line + 0.75, numbers, size=0.6 * size, color="#555555", **options)
    axes.set(xlim=(-1, width + 1), ylim=(lines, -0.1))
    axes.axis("off")
    return axes


def _placed(texts, weights, width):
    """Tokens as tuples `(line, place, token, weight_E)`, and how many lines they take."""
    result, line = [], 0
    for text, weight_LE in zip(texts, weights, strict=True):
        if len(text) > len(weight_LE):
            raise ValueError(
                "`weights` must have a row for every token. "
                f"Received: {len(weight_LE)} rows for {len(text)} tokens"
            )
        place = 0
        for token, weight_E in zip(text, weight_LE, strict=False):
            if place and place + len(token) > width:
                line, place = line + 1, 0
            result.append((line, place, token, np.asarray(weight_E)))
            place += len(token) + 1
        line += 1
    return result, line


def _palette():
    """Ten colours, light enough to be written on."""
    from matplotlib import colormaps

    return [[0.45 + 0.55 * part for part in color] for color in colormaps["tab10"].colors]


def _axes(axes, inches):
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "`keras_moe.plots` needs the package 'matplotlib', which "
            "`pip install 'keras-moe[plots]'` installs."
        ) from error
    return pyplot.subplots(figsize=inches, layout="constrained")[1]
