"""The command line: parses, calls, prints.

Exit codes: 0 done, 2 bad input (one sentence, no traceback, nothing lost), 130 interrupted.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys

from zoo.catalogue import list_presets
from zoo.files import require_absent
from zoo.recipes import preset_recipe
from zoo.tasks.task import SUITES, TASKS, recipe

BACKENDS = ("tensorflow", "jax", "torch")
SAMPLERS = ("greedy", "beam", "top_k", "top_p", "contrastive")


def main(arguments=None):
    """Runs one command.

    Args:
        arguments: list of strings; `None` for those of the process.

    Returns:
        The exit code.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Texts after an option, which argparse leaves over once it has found none before it.
    if rest and (options.run is not _generate or any(x.startswith("-") for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.texts += rest
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's remarks once it is loaded
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"zoo: interrupted; {options.interrupted}", file=sys.stderr)
        return 130
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m zoo",
        description="Mixture-of-experts Transformers: train, convert, generate.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "prepare",
        help="turn GLUE's and SuperGLUE's raw files into a folder that tfds.load opens, offline",
    )
    add = command.add_argument
    add("tasks", nargs="*", metavar="TASK", help="e.g. glue/cola; default: all that are there")
    add(
        "--from",
        dest="source",
        metavar="DIR",
        required=True,
        help="folder with CoLA/train.tsv ... or BoolQ/train.jsonl ...",
    )
    add("--data-dir", metavar="OUT", required=True, help="TensorFlow Datasets folder to write to")
    add("--force", action="store_true", help="prepare again what is there already")
    add(
        "--partial",
        action="store_true",
        help="take DIR/<task>/partial/... where the official file is missing, and mark it so",
    )
    command.set_defaults(
        run=_prepare,
        interrupted="prepare, without --force, goes on with the tasks that are not there yet",
    )

    command = commands.add_parser(
        "finetune",
        help="train a model on a task with model.fit; resumes an interrupted run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_recipes(),
    )
    add = command.add_argument
    add(
        "task",
        nargs="?",
        default="acceptability",
        metavar="TASK",
        help="e.g. glue/sst2, or glue or superglue: all tasks of it that the data folder has; "
        "default: acceptability, "
        "which is generated and needs no data",
    )
    add("--model", help="to build from scratch: switch (default), expert_choice or dense")
    add("--preset", help="to start from: a name, a folder or hf://owner/model")
    add(
        "--no-load-weights",
        dest="load_weights",
        action="store_false",
        default=None,
        help="begin with new weights instead of the preset's",
    )
    add(
        "--train",
        metavar="WHICH",
        help="all (default, see below for presets), frozen_experts, non_experts, experts or lora; "
        "always the head",
    )
    add("--lora-rank", type=int, metavar="N", help="of --train lora; default: 8")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else tensorflow")
    add("--data-dir", metavar="DIR", help="TensorFlow Datasets folder, see prepare")
    add("--output", metavar="DIR", help="default: runs/<task>-<model>-<backend>-seed<seed>")
    add("--restart", action="store_true", help="throw an earlier run in the output folder away")
    add("--epochs", type=int, metavar="N", help="passes over the training data; see below")
    add("--batch-size", type=int, metavar="N", help="examples per step; see below")
    add("--learning-rate", type=float, metavar="RATE", help="peak of the schedule; see below")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens per example, at most 512; default: 64, see below for presets",
    )
    add("--pairs", metavar="HOW", help="two texts are read apart (default) or together")
    add(
        "--mix-layers",
        action=argparse.BooleanOptionalAction,
        help="the head sees a mean of all layers' outputs; default: of a preset, for two texts "
        "that are read apart",
    )
    add("--max-examples", type=int, metavar="N", help="only so many training examples")
    add("--dropout", type=float, metavar="RATE", help="of everything but the experts; see below")
    add("--expert-dropout", type=float, metavar="RATE", help="of the experts; see below")
    add("--seed", type=int, metavar="N", help="of weights, dropout and order; default: 0")
    add("--seeds", type=int, metavar="N", help="a run for each of the seeds 0 to N-1, and a table")
    add(
        "--mesh",
        type=_mesh,
        metavar="data=N,expert=N,model=N",
        help="devices that share batch, experts, hidden units; default: one device",
    )
    add = command.add_argument_group(
        "models built from scratch (a preset brings its own)"
    ).add_argument
    add("--size", help="mini (default), small or base")
    add("--num-experts", type=int, metavar="N", help="experts per sparse block; default: 8")
    command.set_defaults(
        run=_finetune, interrupted="finetune, without --restart, goes on from here"
    )

    command = commands.add_parser(
        "evaluate", help="the official metrics of a run or of a preset's classifier on a split"
    )
    add = command.add_argument
    add("preset", metavar="RUN|PRESET", help="folder of a run, or what --preset of finetune takes")
    add("task", metavar="TASK", help="e.g. glue/sst2")
    add("--split", help="default: the first validation split; test splits have no labels")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else tensorflow")
    add("--data-dir", metavar="DIR", help="TensorFlow Datasets folder, see prepare")
    add("--predictions", metavar="DIR", help="folder to write the submission file to")
    add("--batch-size", type=int, metavar="N", help="examples at a time; default: as the run's")
    command.set_defaults(run=_evaluate, interrupted="nothing is kept")

    command = commands.add_parser(
        "compare", help="runs of several seeds side by side, with tests of their differences"
    )
    add = command.add_argument
    add("folders", nargs="+", metavar="RUNS", help="folders that finetune --seeds wrote")
    add("--epoch", default="best", help="best (on the validation data; default) or last")
    command.set_defaults(run=_compare, interrupted="nothing is kept")

    command = commands.add_parser(
        "pretrain",
        help="train a model on text from scratch; resumes an interrupted run",
        description="Options that are left out are as in `zoo.pretrain`.",
    )
    add = command.add_argument
    add(
        "corpus",
        nargs="+",
        metavar="TEXT",
        help="files (.txt, a document a line; .jsonl or .json; .gz of these), or tfds:NAME:SPLIT",
    )
    add("--heldout", nargs="+", metavar="TEXT", help="the same, to measure the perplexity on")
    add(
        "--data-dir", metavar="DIR", help="TensorFlow Datasets folder, if a text is one of its sets"
    )
    add("--model", help="switch (default), expert_choice or dense")
    add("--objective", help="masked (default), span, prefix or causal")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else tensorflow")
    add("--output", metavar="DIR", help="default: runs/pretrain-<model>-<objective>-<backend>-...")
    add("--restart", action="store_true", help="throw an earlier run in the output folder away")
    add("--size", help="mini (default), small, base ...")
    add("--dtype", help="float32 (default) or mixed_bfloat16")
    add("--optimizer", help="adamw (default) or adafactor")
    add("--schedule", help="cosine (default) or inverse_sqrt")
    for name, metavar, text in (
        ("num-experts", "N", "experts per sparse block"),
        ("steps", "N", "batches to train on"),
        ("steps-per-save", "N", "batches from one checkpoint to the next"),
        ("batch-size", "N", "blocks of text per step"),
        ("length", "N", "tokens of a block"),
        ("warmup-steps", "N", "in which the learning rate rises"),
        ("accumulate", "N", "steps whose gradients make one update"),
        ("window", "N", "blocks that are shuffled together"),
        ("heldout-batches", "N", "of the held-out text"),
        ("seed", "N", "of weights, noise and order"),
    ):
        add(f"--{name}", type=int, metavar=metavar, help=text)
    for name, text in (
        ("learning-rate", "peak of the schedule"),
        ("clip", "largest norm of all gradients; 0: any"),
        ("router-z-weight", "of the routers' z-loss"),
        ("dropout", "everywhere"),
        ("density", "share of the tokens that masked and span hide"),
        ("mean-span", "tokens that span hides in one place, in the mean"),
        ("residual-scale", "of the initial weights that end a layer"),
    ):
        add(f"--{name}", type=float, metavar="X", help=text)
    add(
        "--capacity-factor",
        type=_capacity,
        default="default",
        metavar="X",
        help="of the routers; none: no token is dropped; default: as the model's paper",
    )
    add("--tensorboard", action="store_true", help="write logs to DIR/tensorboard")
    add(
        "--mesh",
        type=_mesh,
        metavar="data=N,expert=N,model=N",
        help="devices that share batch, experts, hidden units; default: one device",
    )
    command.set_defaults(
        run=_pretrain, interrupted="pretrain, without --restart, goes on from the last checkpoint"
    )

    command = commands.add_parser(
        "generate", help="what a language model, or a text-to-text model, makes of texts"
    )
    add = command.add_argument
    add("preset", metavar="PRESET", help="a folder, or hf://owner/model, see presets")
    add("texts", nargs="*", metavar="TEXT", help="default: the lines of the standard input")
    add("--max-length", type=int, default=64, metavar="N", help="tokens; default: 64")
    add("--batch-size", type=int, default=8, metavar="N", help="texts at a time; default: 8")
    add("--sampler", choices=SAMPLERS, default="greedy", help="default: greedy")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else tensorflow")
    add("--dtype", help="of the weights, e.g. bfloat16; auto: as saved; default: float32")
    command.set_defaults(run=_generate, interrupted="nothing is kept")

    command = commands.add_parser(
        "convert", help="a preset to transformers' format, or the other way round"
    )
    add = command.add_argument
    add("source", metavar="SRC", help="a folder, or hf://owner/model, see presets")
    add("target", metavar="DST", help="a folder that is not there yet")
    add("--to", choices=("keras", "transformers"), required=True, help="the format of DST")
    add("--licence", metavar="NAME", help="for the model card; default: as presets says")
    add("--training-data", metavar="TEXT", help="likewise")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else tensorflow")
    add("--dtype", help="of the weights, e.g. bfloat16; auto: as saved; default: float32")
    command.set_defaults(run=_convert, interrupted="DST is not there")

    command = commands.add_parser("presets", help="published models that have a name here")
    command.set_defaults(run=_presets, interrupted="nothing is kept")
    return parser


def _mesh(text):
    """The arguments of an `ExpertParallel`."""
    names = {"data": "data", "expert": "experts", "experts": "experts", "model": "model"}
    mesh = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in names or names[name] in mesh or not size.isdecimal():
            raise argparse.ArgumentTypeError(
                f"must be numbers of devices, such as data=2,expert=4. Received: {text}"
            )
        mesh[names[name]] = int(size)
    return mesh


def _capacity(text):
    """A number, `None` for "none", or "default"."""
    if text in ("none", "default"):
        return None if text == "none" else text
    return float(text)


def _recipes():
    """The tasks and the defaults of each, as a table."""
    lines = [
        "tasks, and the defaults for each; of models from scratch, and on the right of presets:"
    ]
    heads = ("epochs", "batch size", "learning rate", "dropout")
    heads += ("| epochs", "max length")
    widths = [max(len(head), len("0.0005")) + 2 for head in heads]
    cells = zip(heads, widths, strict=True)
    lines.append(" " * 20 + "".join(f"{head:>{width}}" for head, width in cells))
    for task in TASKS:
        preset = preset_recipe(task, sparse=True)
        names = ("epochs", "max_length")
        figures = (*recipe(task).values(), *(preset[name] for name in names))
        cells = zip(figures, widths, strict=True)
        lines.append(f"  {task:18}" + "".join(f"{figure:>{width}}" for figure, width in cells))
    for kind in ("sparse", "dense"):
        preset = preset_recipe(next(iter(TASKS)), sparse=kind == "sparse")
        names = ("train", "learning_rate", "batch_size", "dropout", "expert_dropout")
        figures = ", ".join(
            f"{name.replace('_', ' ')} {preset[name]}" for name in names if preset[name] is not None
        )
        lines.append(f"{kind} presets: {figures}")
    lines.append("with --no-load-weights all is trained")
    return "\n".join(lines)


# Drops the lines that tell of nothing wrong, and what TensorFlow's log says about itself.
_FILTER = r"""
import re, sys
for line in sys.stdin.buffer:
    if not re.match(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog", line):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
"""


@contextlib.contextmanager
def _without_remarks():
    """Keeps what TensorFlow remarks while it is loaded out of stderr; all else passes.

    No setting does: TensorFlow 2.21 reads TF_CPP_MIN_LOG_LEVEL when it sets its log up, and these
    lines are written to the file descriptor before that, while its libraries are loaded. The filter
    is a process of its own, so that the last words before a crash pass, too.
    """
    stderr = os.dup(2)
    command = [sys.executable, "-I", "-S", "-c", _FILTER]
    # In a session of its own, Ctrl-C does not reach it.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True
    ) as process:
        os.dup2(process.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def _prepare(options):
    with _without_remarks():
        from zoo.tasks.prepare import prepare, tasks_in

        with contextlib.suppress(ImportError):
            import tensorflow  # noqa: F401  (TensorFlow Datasets would, between the lines below)
    tasks, left_out = options.tasks, {}
    if not tasks:
        tasks, left_out = tasks_in(options.source, options.partial)
    for task in tasks:
        print(prepare(task, options.source, options.data_dir, options.force, options.partial))
    for task, file in left_out.items():
        print(f"left out: {task} (no {file})")


def _choose_backend(options):
    backend = options.backend or os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend not in BACKENDS:
        raise ValueError(
            f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. Received: {backend!r}"
        )
    if importlib.util.find_spec(backend) is None:
        raise ImportError(
            f"The backend {backend!r} is not installed; `pip install 'keras-moe[{backend}]'` "
            "brings it, and `--backend` chooses another."
        )
    loaded = sys.modules.get("keras")  # by `keras_moe.launch`
    if loaded is not None and loaded.backend.backend() != backend:
        raise ValueError(
            f"`--backend` must be {loaded.backend.backend()}, with which Keras is loaded; "
            f"KERAS_BACKEND chooses it. Received: {backend}"
        )
    os.environ["KERAS_BACKEND"] = backend


def _finetune(options):
    _choose_backend(options)
    with _without_remarks():
        from keras_moe.distribution import process_id
        from zoo.finetuning.run import finetune
        from zoo.finetuning.suite import finetune_suite
        from zoo.finetuning.summary import table

    if options.task == "acceptability" and process_id() == 0:
        print("acceptability: sentences generated from the project's own grammar, in CoLA's form")
    if options.seed is not None and options.seeds is not None:
        raise ValueError(f"`seed` must be left out with `seeds`. Received: seed={options.seed}")
    near = options.task.replace("_", "").lower()
    if near in SUITES and options.task not in SUITES:
        raise ValueError(
            f"`task` must be a task, or one of {', '.join(SUITES)} (did you mean {near!r}?). "
            f"Received: task={options.task!r}"
        )
    given = {**_given(options), "verbose": 1 if sys.stdout.isatty() else 2}
    if options.task in SUITES or options.seeds is not None:
        given.setdefault("seeds", [given.pop("seed", 0)])
        summary = finetune_suite(**given)
        if process_id() == 0:
            print(f"\n{table(summary)}\n")
            print(f"saved: {summary['folder']}")
        return
    results = finetune(**given)
    if process_id() > 0:
        return
    for epoch, entry in (("best", results["best"]), ("last", results["history"][-1])):
        scores = ", ".join(f"{name} {entry[name]:.4f}" for name in results["metrics"])
        print(f"{epoch} epoch {entry['epoch']} of {len(results['history'])}: {scores}")
    print(f"saved: {results['preset']}")


def _evaluate(options):
    _choose_backend(options)
    with _without_remarks():
        from zoo.finetuning.evaluate import evaluate
    scores = evaluate(**_given(options))
    if scores:
        print(", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
    if options.predictions:
        print(f"saved: {options.predictions}")
    elif not scores:
        print("this split has no labels; --predictions writes what is to be submitted")


def _compare(options):
    from zoo.finetuning.compare import compare, comparison_table

    print(comparison_table(compare(*options.folders, epoch=options.epoch)))


def _pretrain(options):
    _choose_backend(options)
    with _without_remarks():
        from keras_moe.distribution import process_id
        from zoo.pretraining.run import pretrain

    results = pretrain(**_given(options), verbose=1 if sys.stdout.isatty() else 2)
    if process_id() > 0:
        return
    last = results["history"][-1]
    scores = ", ".join(f"{name} {last[name]:.4f}" for name in results["metrics"])
    print(f"{results['settings']['steps']} steps: {scores}")
    print(f"saved: {results['preset']}")


def _given(options):
    """The options that were given, by the names of the arguments of a function."""
    return {
        name: value
        for name, value in vars(options).items()
        if name not in ("run", "interrupted", "backend")
        and (value is not None or name == "capacity_factor")
    }


def _generate(options):
    _choose_backend(options)
    for name in ("max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={getattr(options, name)}"
            )
    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        return
    with _without_remarks():
        from zoo.presets import from_preset, require_generation

        require_generation(options.preset)
        model = from_preset(options.preset, dtype=options.dtype)
    model.compile(sampler=options.sampler)
    for first in range(0, len(texts), options.batch_size):
        batch = texts[first : first + options.batch_size]
        print(*model.generate(batch, max_length=options.max_length), sep="\n", flush=True)


def _convert(options):
    _choose_backend(options)
    require_absent(options.target)
    known = next((p for p in list_presets() if p.name == options.source.partition("@")[0]), None)
    facts = {
        "licence": options.licence or (known and known.licence),
        "training_data": options.training_data or (known and known.training_data),
    }
    with _without_remarks():
        from zoo.conversion import save_transformers
        from zoo.presets import from_preset, save_preset

        model = from_preset(options.source, dtype=options.dtype)
    if options.to == "keras":
        save_preset(model, options.target, **facts)
    else:
        save_transformers(model, options.target)
    print(f"saved: {options.target}")


def _presets(options):
    for preset in list_presets():
        print(
            f"{preset.name:32}{preset.kind:23}{preset.parameters / 1e6:11,.0f}M parameters,"
            f"{preset.active_parameters / 1e6:7,.0f}M active, {_size(preset.file_bytes):>16}, "
            f"{preset.licence}, {preset.training_data}"
        )


def _size(file_bytes):
    if file_bytes is None:
        return "size not known"
    return f"about {file_bytes / 1e6:.0f} MB" if file_bytes < 1e9 else f"{file_bytes / 1e9:.1f} GB"
