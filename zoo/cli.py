"""The command line: parses, calls, prints.

Exit codes: 0 done, 2 bad input (one sentence, no traceback, nothing lost), 130 interrupted.
"""

import argparse
import importlib.util
import os
import sys

BACKENDS = ("tensorflow", "jax", "torch")


def main(arguments=None):
    """Runs one command.

    Args:
        arguments: list of strings; `None` for those of the process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's remarks about missing GPUs
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: interrupted; finetune, without --restart, goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m zoo", description="Mixture-of-experts Transformers on GLUE."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "prepare", help="turn GLUE's raw files into a folder that tfds.load opens, without network"
    )
    add = command.add_argument
    add("tasks", nargs="*", metavar="TASK", help="e.g. glue/cola; default: all that are there")
    add(
        "--from", dest="source", metavar="DIR", required=True, help="folder with CoLA/train.tsv ..."
    )
    add("--data-dir", metavar="OUT", required=True, help="TensorFlow Datasets folder to write to")
    add("--force", action="store_true", help="prepare again what is there already")
    command.set_defaults(run=_prepare)

    command = commands.add_parser(
        "finetune", help="train a model on a task with model.fit; resumes an interrupted run"
    )
    add = command.add_argument
    add(
        "task",
        nargs="?",
        default="acceptability",
        metavar="TASK",
        help="e.g. glue/sst2; default: acceptability, which is generated and needs no data",
    )
    add("--model", help="switch (default), expert_choice, dense, or the folder of a preset")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else tensorflow")
    add("--data-dir", metavar="DIR", help="TensorFlow Datasets folder, see prepare")
    add("--output", metavar="DIR", help="default: runs/<task>-<model>-<backend>-seed<seed>")
    add("--restart", action="store_true", help="throw an earlier run in the output folder away")
    add("--size", help="mini (default), small or base")
    add("--num-experts", type=int, metavar="N", help="experts per sparse block (8)")
    add("--epochs", type=int, metavar="N", help="passes over the training data")
    add("--batch-size", type=int, metavar="N", help="examples per step")
    add("--learning-rate", type=float, metavar="RATE", help="peak of the schedule")
    add("--dropout", type=float, metavar="RATE", help="of everything but the experts")
    add(
        "--expert-dropout", type=float, metavar="RATE", help="of the experts; default: as --dropout"
    )
    add("--max-length", type=int, metavar="N", help="tokens per example (64)")
    add("--max-examples", type=int, metavar="N", help="only so many training examples")
    add("--seed", type=int, metavar="N", help="of weights, dropout and order (0)")
    command.set_defaults(run=_finetune)
    return parser


def _prepare(options):
    from zoo.tasks.prepare import prepare, tasks_in

    for task in options.tasks or tasks_in(options.source):
        print(prepare(task, options.source, options.data_dir, force=options.force))


def _finetune(options):
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
    os.environ["KERAS_BACKEND"] = backend
    from zoo.training import finetune

    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("run", "backend") and value is not None
    }
    if options.task == "acceptability":
        print("acceptability: sentences generated from the project's own grammar, in CoLA's form")
    results = finetune(**settings, verbose=1 if sys.stdout.isatty() else 2)
    best = results["best"]
    scores = ", ".join(f"{name} {best[name]:.4f}" for name in results["metrics"])
    print(f"best epoch {best['epoch']} of {len(results['history'])}: {scores}")
    print(f"saved: {results['preset']}")
