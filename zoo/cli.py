"""The command line: parses, calls, prints. Exit codes: 0 done, 2 bad input, 130 interrupted."""

import argparse
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
    try:
        return options.run(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("prepare", help="raw GLUE files to a TensorFlow Datasets folder")
    command.add_argument(
        "tasks", nargs="*", metavar="TASK", help="e.g. glue/cola; default: all there are"
    )
    command.add_argument("--from", dest="source", required=True, help="folder of the raw files")
    command.add_argument("--data-dir", required=True, help="folder to write to")
    command.add_argument("--force", action="store_true", help="prepare again what is there")
    command.set_defaults(run=_prepare)

    command = commands.add_parser("finetune", help="train a model on a task with model.fit")
    command.add_argument(
        "task",
        nargs="?",
        default="acceptability",
        help="e.g. glue/sst2; default: acceptability, generated, no data needed",
    )
    command.add_argument(
        "--model", default="switch", help="switch, expert_choice, dense, or the folder of a preset"
    )
    command.add_argument(
        "--backend", choices=BACKENDS, help="default: KERAS_BACKEND, else Keras' own choice"
    )
    command.add_argument("--data-dir", help="TensorFlow Datasets folder, see prepare")
    command.add_argument(
        "--output", help="folder of the run; default: runs/<task>-<model>-<backend>-seed<seed>"
    )
    command.add_argument("--size", default="mini", help="mini, small or base")
    for name, kind in (
        ("num-experts", int),
        ("epochs", int),
        ("batch-size", int),
        ("learning-rate", float),
        ("dropout", float),
        ("expert-dropout", float),
        ("max-length", int),
        ("max-examples", int),
        ("seed", int),
    ):
        command.add_argument(f"--{name}", type=kind)
    command.add_argument(
        "--restart", action="store_true", help="throw an earlier run in the output folder away"
    )
    command.set_defaults(run=_finetune)
    return parser


def _prepare(options):
    from zoo.tasks.prepare import prepare

    for task in options.tasks:
        print(prepare(task, options.source, options.data_dir, force=options.force))
    return 0


def _finetune(options):
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("run", "backend") and value is not None
    }
    if options.backend:
        os.environ["KERAS_BACKEND"] = options.backend
    from zoo.training import finetune

    if options.task == "acceptability":
        print("acceptability: sentences generated from the project's own grammar, in CoLA's form")
    results = finetune(**settings, verbose=1 if sys.stdout.isatty() else 2)
    best = results["best"]
    scores = ", ".join(
        f"{name[4:]} {best[name]:.4f}"
        for name in best
        if name.startswith("val_") and "/" not in name
    )
    print(f"best epoch {best['epoch']} of {len(results['history'])} on validation: {scores}")
    return 0
