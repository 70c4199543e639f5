"""Small raw GLUE files in the official form of each task."""

from zoo.tasks import TASKS

GLUE = [name for name in TASKS if name.startswith("glue/")]

FOLDERS = {
    "glue/cola": "CoLA",
    "glue/sst2": "SST-2",
    "glue/mrpc": "MRPC",
    "glue/qqp": "QQP",
    "glue/stsb": "STS-B",
    "glue/mnli": "MNLI",
    "glue/qnli": "QNLI",
    "glue/rte": "RTE",
    "glue/wnli": "WNLI",
}

# The columns of a labelled file, where {0} and {1} are the texts and {y} is the label.
_PARSES = {f"sentence{i}_{kind}": "( x )" for i in (1, 2) for kind in ("binary_parse", "parse")}
_COLUMNS = {
    "glue/cola": {"source": "gj04", "label": "{y}", "mark": "*", "sentence": "{0}"},
    "glue/sst2": {"sentence": "{0}", "label": "{y}"},
    "glue/mrpc": {
        "Quality": "{y}",
        "#1 ID": "1{n}",
        "#2 ID": "2{n}",
        "#1 String": "{0}",
        "#2 String": "{1}",
    },
    "glue/qqp": {
        "id": "{n}",
        "qid1": "1{n}",
        "qid2": "2{n}",
        "question1": "{0}",
        "question2": "{1}",
        "is_duplicate": "{y}",
    },
    "glue/stsb": {
        "index": "{n}",
        "genre": "main-captions",
        "filename": "MSRvid",
        "year": "2012test",
        "old_index": "0001",
        "source1": "none",
        "source2": "none",
        "sentence1": "{0}",
        "sentence2": "{1}",
        "score": "{y}",
    },
    "glue/mnli": {
        "index": "{n}",
        "promptID": "7",
        "pairID": "7n",
        "genre": "fiction",
        **_PARSES,
        "sentence1": "{0}",
        "sentence2": "{1}",
        "label1": "neutral",
        "gold_label": "{y}",
    },
    "glue/qnli": {"index": "{n}", "question": "{0}", "sentence": "{1}", "label": "{y}"},
    "glue/rte": {"index": "{n}", "sentence1": "{0}", "sentence2": "{1}", "label": "{y}"},
    "glue/wnli": {"index": "{n}", "sentence1": "{0}", "sentence2": "{1}", "label": "{y}"},
}
_NAMED_LABELS = ("glue/mnli", "glue/qnli", "glue/rte")


def examples(task, split, count=4):
    """Made-up examples: a list of `(texts, label)`, the label as `load` gives it."""
    rows = []
    for n in range(count):
        texts = [f'{split} "{n}', f"it's {n} é\u2028 ok"][: len(TASKS[task].inputs)]
        if split.startswith("test"):
            label = -1
        else:
            label = 1.25 * n if TASKS[task].labels is None else n % TASKS[task].num_classes
        rows.append((texts, label))
    return rows


def write(path, task, rows, labelled=True):
    """Writes rows as an official file of the task, the label column only where labelled."""
    columns = dict(_COLUMNS[task])
    header = True
    if not labelled:
        columns = {name: text for name, text in columns.items() if text != "{y}"}
        columns.pop("label1", None)
        if task in ("glue/cola", "glue/sst2"):
            columns = {"index": "{n}", "sentence": "{0}"}
        if task == "glue/mrpc":
            columns = {"index": "{n}"} | columns
    elif task == "glue/cola":
        header = False
    lines = ["\t".join(columns)] if header else []
    for n, (texts, label) in enumerate(rows):
        shown = TASKS[task].labels[label] if labelled and task in _NAMED_LABELS else label
        fields = [text.format(*texts, y=shown, n=n) for text in columns.values()]
        lines.append("\t".join(fields))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(root, task, tests=True):
    """Writes all files of a task under `root`; returns its folder."""
    folder = root / FOLDERS[task]
    stems = {"train": "train", "validation": "dev", "test": "test"}
    for split in TASKS[task].splits:
        kind, _, part = split.partition("_")
        if tests or kind != "test":
            name = stems[kind] + (f"_{part}" if part else "") + ".tsv"
            write(folder / name, task, examples(task, split), labelled=kind != "test")
    return folder
