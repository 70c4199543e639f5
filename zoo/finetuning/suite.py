"""Fine-tuning over seeds and tasks."""

import contextlib
import gc
import json
from pathlib import Path

from keras_moe.distribution import process_id
from zoo.finetuning.run import Bench, label, open_run
from zoo.finetuning.settings import settle
from zoo.finetuning.summary import summarise
from zoo.runs import devices, replacing
from zoo.tasks import SUITES, data, get, validation_splits


def finetune_suite(
    task="glue",
    model=None,
    *,
    seeds=5,
    data_dir=None,
    output=None,
    restart=False,
    mesh=None,
    verbose="auto",
    **options,
):
    """Fine-tunes on a task, or on all tasks of a suite, with several seeds.

    Every run is one of `zoo.finetune`, in the folder `<output>/<task>/seed<k>`: an interrupted one
    is gone on with, a finished one not repeated. Runs on a task differ in the seed alone. In the
    end `output` has `summary.json`, for `zoo.compare`.

    Args:
        task: name of a task, or "glue" or "superglue": all tasks of it that `data_dir` has.
        model: as in `zoo.finetune`.
        seeds: that many, from 0 on; or a list of them.
        data_dir: as in `zoo.finetune`.
        output: folder; by default named after task, model and backend.
        restart: throws earlier runs away.
        mesh: as in `zoo.finetune`.
        verbose: as in `zoo.finetune`.
        **options: other arguments of `zoo.finetune`, but for the seed; `pairs` is for those tasks
            of a suite that have two texts.

    Returns:
        The content of `summary.json`; `zoo.finetuning.summary.table` shows it.

    Raises:
        ValueError: as `zoo.finetune`, before anything is trained.
        FileNotFoundError: if there is data for none of the tasks.
        FloatingPointError: as `zoo.finetune`.
    """
    parallel = devices(mesh)
    seeds = _seeds(seeds)
    suite = task if task in SUITES else None
    tasks = SUITES[task] if suite else (get(task).name,)
    settings = {
        name: [settle(name, model, seed=seed, **_of_task(name, options, suite)) for seed in seeds]
        for name in tasks
    }
    first = settings[tasks[0]][0]
    name = f"{task.replace('/', '-')}-{label(first)}"
    output = Path(output or Path("runs") / name)
    runs = {
        task: [
            open_run(output / task.replace("/", "-") / f"seed{s['seed']}", s, restart) for s in each
        ]
        for task, each in settings.items()
    }
    left_out = {}
    for name in tasks if suite else ():
        is_finished = all(run.finished for run in runs[name])
        if is_finished:
            continue
        if (reason := missing_data(name, data_dir)) is not None:
            left_out[name] = reason
        else:
            _check_batch_size(name, settings[name][0], data_dir)
    if len(left_out) == len(tasks):
        raise FileNotFoundError(next(iter(left_out.values())))
    with contextlib.nullcontext() if parallel is None else parallel.scope():
        for name in tasks:
            if name not in left_out:
                bench = Bench(settings[name][0], data_dir)
                for run in runs[name]:
                    _say(f"{name}, seed {run.results['settings']['seed']}", verbose)
                    bench.train(run, verbose)
                del bench
                gc.collect()  # a model and its compiled functions refer to each other
    done = {name: runs[name] for name in tasks if name not in left_out}
    summary = summarise(done, output, suite, left_out)
    if process_id() == 0:
        output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def missing_data(task, data_dir=None):
    """Why a task cannot be trained on.

    Args:
        task: A `Task` or the name of one.
        data_dir: The TensorFlow Datasets directory; `None` for the default one.

    Returns:
        A sentence, or `None` if all of its data is there.
    """
    try:
        for split in ("train", *validation_splits(task, data_dir)[0]):
            data.load(task, split, data_dir)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def _check_batch_size(task, settings, data_dir):
    """Refuses now what would stop the suite when it comes to this task."""
    examples = len(data.load(task, "train", data_dir).labels)
    if settings["batch_size"] > examples:
        raise ValueError(
            f"`batch_size` must be at most the number of examples of {task}, {examples}. "
            f"Received: batch_size={settings['batch_size']}"
        )


def _seeds(seeds):
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            "`seeds` must be a positive integer, or a list of different ones. "
            f"Received: seeds={seeds}"
        )
    return chosen


def _of_task(name, options, suite):
    """The options of a task of a suite, of which one with one text has no `pairs`."""
    if suite and len(get(name).inputs) == 1:
        return {option: value for option, value in options.items() if option != "pairs"}
    return options


def _say(text, verbose):
    if verbose and process_id() == 0:
        print(text, flush=True)
