"""Documents of TensorFlow Datasets that are prepared: nothing is downloaded, or built."""

from zoo.extras import quiet_datasets, require

TFDS = "tfds:"


def found(pattern, argument="corpus", data_dir=None):
    """The folder and split of a data set, from its name.

    Args:
        pattern: "tfds:NAME" or "tfds:NAME:SPLIT"; by default the split is "train".
        argument: what errors call the pattern.
        data_dir: folder of TensorFlow Datasets; `None`: its default one.

    Returns:
        "tfds:FOLDER:SPLIT".

    Raises:
        ValueError: if it is not prepared, or has no such split, or no feature `text`.
        ImportError: if TensorFlow Datasets is not installed.
    """
    tfds = require("tensorflow_datasets")
    name, split = _named(pattern)
    try:
        with quiet_datasets():
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"`{argument}` must name data sets that are prepared: `tfds build {name}` does it. "
            f"Received: {pattern}, data_dir={data_dir}"
        ) from error
    if "text" not in builder.info.features:
        raise ValueError(
            f"`{argument}` must name data sets with a feature `text`. Received: {pattern}, with "
            f"{', '.join(builder.info.features)}"
        )
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must name one of the splits {', '.join(builder.info.splits)} of {name}, "
            f"or a part of one. Received: {pattern}"
        ) from error
    return f"{TFDS}{builder.data_path}:{split}"


def documents(source, first=0):
    """The texts of a data set, but for empty ones, each with the number of examples up to it.

    Args:
        source: of `found`.
        first: examples to skip.

    Yields:
        Pairs of a string and an integer.
    """
    builder, split = _opened(source)
    examples = builder.as_dataset(split=split, shuffle_files=False).skip(first)
    for number, example in enumerate(examples.as_numpy_iterator(), first + 1):
        text = example["text"].decode("utf-8", "replace")
        if text.strip():
            yield text, number


def size(source):
    """Bytes and examples of a data set, at least 1 each."""
    builder, split = _opened(source)
    info = builder.info.splits[split]
    return max(1, info.num_bytes), max(1, info.num_examples)


def overlap(source, other):
    """Whether two sources have examples of a data set in common."""
    if not other.startswith(TFDS) or _named(source)[0] != _named(other)[0]:
        return False
    return any(
        file == same and begin < other_end and other_begin < end
        for file, begin, end in _parts(source)
        for same, other_begin, other_end in _parts(other)
    )


def _parts(source):
    """The files of a data set that are read, each from one example to before another."""
    builder, split = _opened(source)
    return [
        (part.filename, part.skip, part.skip + part.take)
        for part in builder.info.splits[split].file_instructions
    ]


def title(source):
    """The name of a data set, with config and version, and its split, wherever it is kept."""
    builder, split = _opened(source)
    return f"{TFDS}{builder.info.full_name}:{split}"


def _opened(source):
    folder, split = _named(source)
    with quiet_datasets():
        return require("tensorflow_datasets").builder_from_directory(folder), split


def _named(source):
    """Name or folder, and split, in which there may be a colon, too: "train[:10%]"."""
    above, slash, last = source.removeprefix(TFDS).rpartition("/")
    name, _, split = last.partition(":")
    return above + slash + name, split or "train"
