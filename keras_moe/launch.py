"""Runs a program as one of several processes: `python -m keras_moe.launch ... PROGRAM ...`.

The same line in every process, under Slurm

    srun --ntasks=4 python -m keras_moe.launch train.py --epochs 10

in the pods of an indexed job of Kubernetes, where `train-0.train` is the name of the first

    python -m keras_moe.launch --coordinator train-0.train:61440 --processes 4 -m zoo finetune ...

or by hand, with another `--process-id` in each

    python -m keras_moe.launch --coordinator 10.0.0.1:61440 --processes 2 --process-id 0 train.py

Exit codes: those of the program; 2 if the processes did not come together.
"""

import argparse
import runpy
import sys
from pathlib import Path

from keras_moe.distribution.cluster import initialize, leave

_OPTIONS = {
    "coordinator": "--coordinator",
    "num_processes": "--processes",
    "process_id": "--process-id",
    "timeout": "--timeout",
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m keras_moe.launch",
        description="Joins the processes of a run, and runs a Python program in each.",
        epilog="What is left out is taken from SLURM_PROCID, SLURM_NTASKS, SLURM_JOB_NODELIST and "
        "SLURM_JOB_ID, or the process id from JOB_COMPLETION_INDEX.",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="the number of this one")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds until all are there (300)"
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module")
    parser.add_argument("program", metavar="PROGRAM", help="a Python file")
    parser.add_argument(
        "arguments", metavar="...", nargs=argparse.REMAINDER, help="those of the program"
    )
    options = parser.parse_args(arguments)
    if not options.is_module and not Path(options.program).is_file():
        parser.error(f"`PROGRAM` must be a file. Received: {options.program}")
    try:
        initialize(options.coordinator, options.processes, options.process_id, options.timeout)
    except (ValueError, TimeoutError) as error:
        said = str(error)
        for name, option in _OPTIONS.items():
            said = said.replace(f"`{name}`", f"`{option}`")
        parser.exit(2, f"error: {said}\n")
    sys.argv = [options.program, *options.arguments]
    if options.is_module:
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(options.program).resolve().parent)
        runpy.run_path(options.program, run_name="__main__")
    leave()


if __name__ == "__main__":
    main()
