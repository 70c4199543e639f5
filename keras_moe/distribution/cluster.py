"""Several processes as one: which they are, and that all of them are there.

The processes of a run meet at the address of the first one before a backend connects them: a
backend waits long for a process that never comes, and does not say for which; and TensorFlow wants
to know the addresses of all. Each says who it is; once all are there, they are told the addresses
and a seed, say that they heard it, and go.
"""

import contextlib
import functools
import ipaddress
import json
import os
import re
import secrets
import socket
import time

import keras
import numpy as np

_FIRST_PORT, _JOBS, _TASKS = 10240, 352, 64  # ports of Slurm's jobs, below those of connections
_LONGEST = 65536  # bytes of a message; who says hello has 256
_PATIENCE = 5  # seconds for a message that must be on its way
_THREADS = 32  # of XLA on CPU, enough for a process with a dozen devices


def initialize(coordinator=None, num_processes=None, process_id=None, timeout=300):
    """Joins the processes of a run, on one machine or many; `python -m keras_moe.launch` calls it.

    Every process runs the same program and reads the same batches; an `ExpertParallel` that is made
    afterwards lies over the devices of all. They get one random seed, so that they make the same
    weights and shuffle alike. It must be called once, before the program's first tensor, and before
    `process_id` and `num_processes` are asked. On JAX it has XLA make at least 32 threads on CPU,
    unless the environment's PJRT_NPROC says how many.

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
        RuntimeError: by JAX, if it is too late.
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
    host, port = _checked(**settings, timeout=timeout)
    meeting = _Meeting(host, port, settings["num_processes"], timeout)
    if settings["process_id"] == 0:
        addresses, seed = meeting.wait_for_all()
    else:
        addresses, seed = meeting.come(settings["process_id"])
    keras.utils.set_random_seed(seed)
    _connect(addresses, **settings, timeout=timeout)


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
    """Returns once every process has called it: what the first one wrote is there then.

    Raises:
        ValueError: on TensorFlow, by several processes that have no `ExpertParallel` yet.
    """
    everyones(0)


def everyones(value):
    """An integer of each process, a list; all of them must ask.

    Raises:
        ValueError: as `barrier`.
    """
    if num_processes() == 1:
        return [int(value)]
    if keras.backend.backend() == "jax":
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(np.int32(value)).tolist()
    import tensorflow as tf
    from tensorflow.experimental import dtensor

    mesh = _all_devices()
    layout = dtensor.Layout(["all"], mesh)
    parts = [tf.constant([int(value)], tf.int32)] * mesh.num_local_devices()
    whole = dtensor.relayout(dtensor.pack(parts, layout), dtensor.Layout.replicated(mesh, 1))
    return dtensor.unpack(whole)[0].numpy()[:: mesh.num_local_devices()].tolist()


def agreed(name, value):
    """The integer, if it is the same in all processes, which all ask.

    Raises:
        ValueError: in all of them, if it is not.
    """
    values = everyones(value)
    if len(set(values)) > 1:
        raise ValueError(
            f"`{name}` must be a folder that shows all processes the same. "
            f"Received: {', '.join(map(str, values))} epochs in it, as processes 0 and on see it"
        )
    return value


def by_first(function, *arguments):
    """Process 0 calls the function, and the others wait; an error there is one everywhere.

    Raises:
        RuntimeError: in the others, if the function raised in process 0.
    """
    error = None
    if process_id() == 0:
        try:
            function(*arguments)
        except Exception as raised:  # it is raised below, once the others know
            error = raised
    failed = any(everyones(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("Process 0 must have written its files. Received: an error there")


def leave():
    """Ends together with the others, where one that left first would be an error to them."""
    if keras.backend.backend() == "tensorflow" and num_processes() > 1:
        with contextlib.suppress(ValueError):  # no mesh
            barrier()


@functools.cache
def _all_devices():
    """A mesh of TensorFlow's devices in one row, those of process 0 first."""
    from tensorflow.dtensor.python import accelerator_util
    from tensorflow.experimental import dtensor

    if not accelerator_util.is_initialized():
        raise ValueError(
            "`ExpertParallel` must be made before processes can wait for each other on TensorFlow. "
            "Received: none"
        )
    kind = dtensor.preferred_device_type()
    devices = ("all", dtensor.num_global_devices(kind))
    return dtensor.create_distributed_mesh([devices], device_type=kind)


def _environment():
    """What Slurm and Kubernetes say of this process."""
    environment = os.environ
    if "SLURM_PROCID" in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
        found = {"num_processes": int(tasks), "process_id": int(environment["SLURM_PROCID"])}
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if nodes and "SLURM_JOB_ID" in environment:
            job, step = int(environment["SLURM_JOB_ID"]), environment.get("SLURM_STEP_ID", "0")
            number = job + (int(step) if step.isdigit() else 0)
            port = min(_FIRST_PORT + _TASKS * (number % _JOBS), 65536 - int(tasks))
            found["coordinator"] = f"{_first_node(nodes)}:{port}"
        return found
    if "JOB_COMPLETION_INDEX" in environment:
        return {"process_id": int(environment["JOB_COMPLETION_INDEX"])}
    return {}


def _run():
    """A name that processes of other runs do not have, where there is one."""
    return ".".join(os.environ.get(f"SLURM_{part}_ID", "") for part in ("JOB", "STEP"))


def _first_node(nodes):
    """The first of Slurm's list of nodes, `rack1` of `rack[1-2]n[03,5],gpu1` is `rack1n03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes).group()
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _checked(coordinator, num_processes, process_id, timeout):
    """Host and port of a coordinator; the numbers are in range."""
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        least = 1 if name == "num_processes" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"`{name}` must be an integer of at least {least}, unless `srun` started the "
                f"program, or as `process_id` JOB_COMPLETION_INDEX is set. Received: {value!r}"
            )
    if process_id >= num_processes:
        raise ValueError(
            f"`process_id` must be below the number of processes, {num_processes}. "
            f"Received: {process_id}"
        )
    if not timeout > 0:
        raise ValueError(f"`timeout` must be a positive number of seconds. Received: {timeout}")
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) <= 65536 - num_processes:
        raise ValueError(
            '`coordinator` must be "host:port" of process 0, with a port from 1 to '
            f"{65536 - num_processes}. Received: {coordinator!r}"
        )
    return host.strip("[]"), int(port)


class _Meeting:
    """Where the processes of one run meet.

    Args:
        host: of process 0.
        port: where it listens.
        num_processes: that must come.
        timeout: seconds that they may take.
    """

    def __init__(self, host, port, num_processes, timeout):
        self.host = host
        self.port = port
        self.num_processes = num_processes
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout

    @property
    def left(self):
        return self.deadline - time.monotonic()

    def wait_for_all(self):
        """What process 0 does; returns the addresses of all, and a seed."""
        here = {}  # number -> connection
        try:
            with self._server() as server:
                while True:
                    while len(here) < self.num_processes - 1:
                        self._welcome(server, here)
                    answer = {"addresses": self._addresses(here), "seed": secrets.randbelow(2**31)}
                    for connection in here.values():
                        _write(connection, answer)
                    gone = [i for i, x in here.items() if _read(x, _PATIENCE) != {"heard": True}]
                    if not gone:
                        break
                    for number in gone:  # it gave up, and may come again
                        here.pop(number).close()
            for connection in here.values():
                _write(connection, {"go": True})
                _read(connection, _PATIENCE)  # it closes first: the port is free afterwards
        except (ValueError, TimeoutError) as error:
            kind = "timeout" if isinstance(error, TimeoutError) else "value"
            for connection in here.values():
                _write(connection, {kind: str(error)})
            raise
        finally:
            for connection in here.values():
                connection.close()
        return answer["addresses"], answer["seed"]

    def _server(self):
        options = {}
        if socket.has_dualstack_ipv6():
            options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        try:
            return socket.create_server(("", self.port), **options)
        except OSError as error:
            raise ValueError(
                "`coordinator` must have a free port. "
                f"Received: {_address(self.host, self.port)}, {error.strerror}"
            ) from error

    def _welcome(self, server, here):
        """One more process, or a stranger, who is not heard."""
        server.settimeout(max(self.left, 1e-3))
        try:
            connection, (peer, *_) = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, self.num_processes)) - set(here))
            raise TimeoutError(
                f"All {self.num_processes} processes must come to "
                f"{_address(self.host, self.port)} within {self.timeout} s. "
                f"Missing: process {', '.join(map(str, missing))}"
            ) from None
        hello = _read(connection, min(_PATIENCE, max(self.left, 1e-3)), 256)
        number, count = hello.get("process_id"), hello.get("num_processes")
        if hello.get("run") != _run() or type(number) is not int or type(count) is not int:
            connection.close()
            return
        if number in here and _is_gone(here[number]):
            here.pop(number).close()
        if number in here or count != self.num_processes or not 0 < number < count:
            wrong = ValueError(
                f"`process_id` must be another for each of {self.num_processes} processes. "
                f"Received: process_id={number}, num_processes={count} from {peer}, at "
                f"{_address(self.host, self.port)}"
            )
            _write(connection, {"value": str(wrong)})
            connection.close()
            raise wrong
        here[number] = connection

    def _addresses(self, here):
        hosts = [self.host]
        for _, connection in sorted(here.items()):
            peer = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0])
            peer = getattr(peer, "ipv4_mapped", None) or peer
            hosts.append(self.host if peer.is_loopback else str(peer))
        return [_address(host, self.port + number) for number, host in enumerate(hosts)]

    def come(self, process_id):
        """What the others do: look for process 0 until it is there; returns what it says."""
        hello = {"run": _run(), "process_id": process_id, "num_processes": self.num_processes}
        last = "nothing"
        while self.left > 0:
            try:
                with socket.create_connection((self.host, self.port), self.left) as connection:
                    _write(connection, hello)
                    answer = _read(connection, self.left + _PATIENCE)
                    while "addresses" in answer:  # more than once, if another one was gone
                        told = answer
                        _write(connection, {"heard": True})
                        answer = _read(connection, max(self.left, 0) + _PATIENCE)
            except OSError as error:  # it is not there yet
                last, answer = error.strerror or str(error), {}
            if "timeout" in answer:
                raise TimeoutError(answer["timeout"])
            if "value" in answer:
                raise ValueError(answer["value"])
            if "go" in answer:
                return told["addresses"], told["seed"]
            time.sleep(0.1)
        raise TimeoutError(
            f"Process 0 must answer at {_address(self.host, self.port)} within {self.timeout} s. "
            f"Received: {last}, at process {process_id} of {self.num_processes}"
        )


def _read(connection, seconds, longest=_LONGEST):
    """A message, a line of JSON, that comes in time; an empty one where there is none."""
    deadline, line = time.monotonic() + seconds, b""
    try:
        while not line.endswith(b"\n") and len(line) < longest:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = connection.recv(longest - len(line))
            if not part:
                return {}
            line += part
        message = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _is_gone(connection):
    """Whether the other side has closed it; it has nothing to say."""
    connection.settimeout(1e-3)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _write(connection, message):
    with contextlib.suppress(OSError):  # it is gone
        connection.settimeout(_PATIENCE)
        connection.sendall(json.dumps(message).encode() + b"\n")


def _address(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cores():
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _connect(addresses, coordinator, num_processes, process_id, timeout):
    """Has the backend connect the processes: JAX now, TensorFlow when a mesh is made."""
    if keras.backend.backend() == "jax":
        import jax

        # Or it takes the signal that ends a process, and a device of Slurm's choice.
        jax.config.update("jax_enable_preemption_service", False)
        # On CPU a device holds a thread while its step waits for those of other processes, and one
        # to begin the next. XLA has one for each core, and where they do not suffice all wait.
        if not os.environ.get("PJRT_NPROC"):
            os.environ["PJRT_NPROC"] = str(max(_cores(), _THREADS))
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=max(1, round(timeout)),
            cluster_detection_method="deactivate",
        )
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
