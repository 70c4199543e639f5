"""Several processes as one: which they are, and that all of them are there.

The processes of a run meet at the address of the first one before a backend connects them: a
backend waits long for a process that never comes, and does not say for which; and TensorFlow wants
to know the addresses of all.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import socket
import time

import keras

_FIRST_PORT, _PORTS = 61440, 4096  # of Slurm's jobs, by their numbers
_LONGEST = 65536  # bytes of a message
_PATIENCE = 5  # seconds for a message, once there is a connection


def initialize(coordinator=None, num_processes=None, process_id=None, timeout=300):
    """Joins the processes of a run, on one machine or many; `python -m keras_moe.launch` calls it.

    Every process runs the same program and reads the same batches; an `ExpertParallel` that is made
    afterwards lies over the devices of all. They get one random seed, so that they make the same
    weights and shuffle alike. It must be called before the program's first tensor.

    What is not given comes from Slurm, in a program that `srun` started; in an indexed job of
    Kubernetes the number of this process does.

    Args:
        coordinator: "host:port" of process 0, which the others reach. On TensorFlow process `i`
            listens on `port + i` afterwards.
        num_processes: how many there are; 1: nothing happens.
        process_id: the number of this one, from 0.
        timeout: seconds until all must have come.

    Raises:
        ValueError: if an argument is missing or out of range, if the port is taken, if the
            processes do not agree on how many they are, or on PyTorch.
        TimeoutError: if a process does not come.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        raise ValueError(
            "`initialize` must be called on JAX or TensorFlow, whose engines join processes. "
            f"Received: the backend {backend}"
        )
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    found = _environment()
    settings = {name: found.get(name) if v is None else v for name, v in given.items()}
    if settings["num_processes"] == 1:
        return
    host, port = _checked(**settings)
    meet = _gather if settings["process_id"] == 0 else _join
    addresses, seed = meet(host, port, settings["num_processes"], settings["process_id"], timeout)
    keras.utils.set_random_seed(seed)
    _connect(addresses, **settings)


def process_id():
    """The number of this process, from 0: process 0 writes what is to be written once."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index()
    return int(os.environ.get("DTENSOR_CLIENT_ID", 0))


def num_processes():
    """How many processes were joined; 1: this one is alone."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_count()
    return int(os.environ.get("DTENSOR_NUM_CLIENTS", 1))


def barrier():
    """Returns once every process has called it; the first one's files are there then, say."""
    if keras.backend.backend() == "jax":
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("keras_moe")
    elif num_processes() > 1:
        from tensorflow.experimental import dtensor

        dtensor.barrier(_all_devices(), "keras_moe")


@functools.cache
def _all_devices():
    from tensorflow.experimental import dtensor

    kind = dtensor.preferred_device_type()
    devices = ("all", dtensor.num_global_devices(kind))
    return dtensor.create_distributed_mesh([devices], device_type=kind)


def _environment():
    """What Slurm and Kubernetes say of this process."""
    environment = os.environ
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS
        return {
            "coordinator": f"{_first_node(nodes)}:{port}",
            "num_processes": int(environment["SLURM_NTASKS"]),
            "process_id": int(environment["SLURM_PROCID"]),
        }
    if "JOB_COMPLETION_INDEX" in environment:
        return {"process_id": int(environment["JOB_COMPLETION_INDEX"])}
    return {}


def _first_node(nodes):
    """The first of Slurm's list of nodes, `tpu[03-05,9],gpu1`."""
    name, first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes).groups()
    return name + (first or "")


def _checked(coordinator, num_processes, process_id):
    """Host and port of a coordinator; the numbers are in range."""
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        least = 1 if name == "num_processes" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"`{name}` must be an integer of at least {least}, or a program that `srun` "
                f"started be told by Slurm. Received: {name}={value!r}"
            )
    if process_id >= num_processes:
        raise ValueError(
            f"`process_id` must be below the number of processes, {num_processes}. "
            f"Received: process_id={process_id}"
        )
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f'`coordinator` must be "host:port" of process 0. Received: coordinator={coordinator!r}'
        )
    return host.strip("[]"), int(port)


def _gather(host, port, num_processes, process_id, timeout):
    """What process 0 does: waits for the others, and tells all of them the addresses and a seed."""
    deadline = time.monotonic() + timeout
    hosts, connections, wrong = {0: host}, [], None
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"`coordinator` must have a free port. Received: {host}:{port}, {error.strerror}"
        ) from error
    with server:
        while len(hosts) < num_processes and wrong is None:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection, (peer, *_) = server.accept()
            except TimeoutError:
                wrong = TimeoutError(
                    f"All {num_processes} processes must come to {host}:{port} within {timeout} s. "
                    f"Missing: {_numbers(set(range(num_processes)) - set(hosts))}"
                )
                break
            hello = _read(connection)
            if not {"process_id", "num_processes"} <= set(hello):  # somebody else
                connection.close()
                continue
            connections.append(connection)
            number = hello["process_id"]
            if hello["num_processes"] != num_processes or number in hosts:
                wrong = ValueError(
                    f"`process_id` must be another for each of {num_processes} processes. "
                    f"Received: process_id={number}, num_processes={hello['num_processes']} from "
                    f"{peer}, at {host}:{port}"
                )
            hosts[number] = peer
        addresses = [_address(hosts[i], port + i) for i in sorted(hosts)]
        seed = secrets.randbelow(2**31)
        for connection in connections:
            answer = {"addresses": addresses, "seed": seed}
            _write(connection, answer if wrong is None else {"wrong": str(wrong)})
        for connection in connections:  # the other side closes first: the port is free afterwards
            _read(connection)
            connection.close()
    if wrong is not None:
        raise wrong
    return addresses, seed


def _join(host, port, num_processes, process_id, timeout):
    """What the others do: look for process 0 until it is there, and ask it."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), left) as connection:
                _write(connection, {"process_id": process_id, "num_processes": num_processes})
                answer = _read(connection, left + _PATIENCE)
        except OSError:  # it is not there yet
            answer = {}
        if "wrong" in answer:
            raise (TimeoutError if "Missing" in answer["wrong"] else ValueError)(answer["wrong"])
        if "addresses" in answer:
            return answer["addresses"], answer["seed"]
        time.sleep(0.1)
    raise TimeoutError(
        f"Process 0 must answer at {host}:{port} within {timeout} s. "
        f"Received: nothing, at process {process_id} of {num_processes}"
    )


def _read(connection, timeout=_PATIENCE):
    """A message, a line of JSON; an empty one where there is none."""
    connection.settimeout(timeout)
    try:
        with connection.makefile("rb") as lines:
            message = json.loads(lines.readline(_LONGEST))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _write(connection, message):
    with contextlib.suppress(OSError):  # it is gone, and has said why
        connection.sendall(json.dumps(message).encode() + b"\n")


def _address(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _numbers(numbers):
    return "process " + ", ".join(str(number) for number in sorted(numbers))


def _connect(addresses, coordinator, num_processes, process_id):
    """Has the backend connect the processes: JAX now, TensorFlow when a mesh is made."""
    if keras.backend.backend() == "jax":
        keras.distribution.initialize(coordinator, num_processes, process_id)
        return
    from keras_moe.distribution import tensorflow_replicas

    tensorflow_replicas.mend()
    task = {"type": "worker", "index": process_id}
    os.environ |= {
        "DTENSOR_JOB_NAME": "worker",
        "DTENSOR_JOBS": ",".join(addresses),
        "DTENSOR_NUM_CLIENTS": str(num_processes),
        "DTENSOR_CLIENT_ID": str(process_id),
        # for `tf.distribute.MultiWorkerMirroredStrategy`
        "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
    }
