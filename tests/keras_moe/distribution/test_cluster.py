"""Processes that meet, each a thread here; what a backend does afterwards is in test_runs.py."""

import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest

from keras_moe import launch
from keras_moe.distribution import cluster, initialize

CONNECT = cluster._connect
TORCH = keras.backend.backend() == "torch"


@pytest.mark.skipif(not TORCH, reason="processes can be joined")
def test_where_no_engine_joins_processes():
    with pytest.raises(ValueError, match="`initialize` must be called on JAX or TensorFlow"):
        initialize("127.0.0.1:1", 2, 0)


if TORCH:
    pytest.skip("no engine joins processes", allow_module_level=True)


@pytest.fixture(autouse=True)
def connected(monkeypatch):
    """What the backend was told, by process."""
    told, seeds = {}, []

    def connect(addresses, coordinator, num_processes, process_id, timeout):
        told[process_id] = {"addresses": addresses, "seed": seeds[-1]}

    monkeypatch.setattr(cluster, "_connect", connect)
    monkeypatch.setattr(keras.utils, "set_random_seed", seeds.append)
    for name in ("SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return told


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def together(*calls):
    """What each of several calls of `initialize` at once returns or raises."""

    def call(arguments):
        try:
            return initialize(*arguments)
        except (ValueError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_all_learn_the_addresses_and_one_seed(connected, port):
    address = f"127.0.0.1:{port}"
    assert together(*((address, 3, i, 20) for i in (2, 0, 1))) == [None] * 3
    assert connected.keys() == {0, 1, 2}
    assert connected[0] == connected[1] == connected[2]
    assert connected[0]["addresses"] == [f"127.0.0.1:{port + i}" for i in range(3)]
    with socket.create_server(("127.0.0.1", port)):
        pass  # it is free again, for the backend


def test_all_are_told_who_is_missing(connected, port):
    address = f"127.0.0.1:{port}"
    errors = together((address, 4, 0, 1.0), (address, 4, 2, 1.0))
    for error in errors:
        assert type(error) is TimeoutError
        assert str(error) == (
            f"All 4 processes must come to {address} within 1.0 s. Missing: process 1, 3"
        )
    assert not connected


def test_a_coordinator_that_is_not_there(connected, port):
    with pytest.raises(TimeoutError, match=f"Process 0 must answer at 127.0.0.1:{port} within 0.3"):
        initialize(f"127.0.0.1:{port}", 2, 1, 0.3)
    assert not connected


def connected_to(port):
    """A connection to process 0, which may only be about to listen."""
    for _ in range(1000):
        try:
            return socket.create_connection(("127.0.0.1", port), 10)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise TimeoutError(port)


def answer(port, words):
    """What process 0 says to these."""
    with connected_to(port) as talk:
        talk.sendall(words)
        return talk.makefile().readline()


@pytest.mark.parametrize("other", [(3, 1), (2, 0), (2, 7)], ids=str)
def test_processes_that_do_not_agree(port, other):
    """Process 0 of 2, and one that says that it is 1 of 3, 0 of 2 again, or 7 of 2."""
    num_processes, process_id = other
    hello = {"run": ".", "num_processes": num_processes, "process_id": process_id}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(initialize, f"127.0.0.1:{port}", 2, 0, 20)
        told = json.loads(answer(port, json.dumps(hello).encode() + b"\n"))["value"]
        with pytest.raises(ValueError, match="`process_id` must be another for each of 2") as error:
            first.result()
    assert told == str(error.value)
    assert f"process_id={process_id}, num_processes={num_processes} from " in told


STRANGERS = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"[1, 2]\n",
    b"[" * 3000 + b"\n",
    b'{"run": ".", "process_id": 1}\n',
    b'{"run": ".", "process_id": "1", "num_processes": 2}\n',
    b'{"run": ".", "process_id": [1], "num_processes": 2}\n',
    b'{"run": "7.0", "process_id": 1, "num_processes": 2}\n',  # of another job
)


def test_strangers_are_not_heard(connected, port):
    address = f"127.0.0.1:{port}"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(initialize, address, 2, 0, 20)
        for words in STRANGERS:
            with contextlib.suppress(ConnectionResetError):
                assert answer(port, words) == ""
        initialize(address, 2, 1, 20)
        first.result()
    assert connected.keys() == {0, 1}


def test_one_that_gave_up_is_waited_for_again(connected, port):
    """Process 1 of 3 comes, and is gone when the last one does; another process 1 comes later."""
    address = f"127.0.0.1:{port}"
    hello = {"run": ".", "num_processes": 3, "process_id": 1}
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(initialize, address, 3, 0, 20)
        gone = connected_to(port)
        gone.sendall(json.dumps(hello).encode() + b"\n")
        gone.close()
        last = pool.submit(initialize, address, 3, 2, 20)
        again = pool.submit(initialize, address, 3, 1, 20)
        assert [call.result() for call in (first, last, again)] == [None] * 3
    assert connected.keys() == {0, 1, 2}


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"`coordinator` must have a free port.*:{port}, Addr"):
            initialize(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), '`coordinator` must be "host:port" of process 0, .*Received: None'),
        (("10.0.0.1", 2, 0), '`coordinator` must be "host:port"'),
        (("host:99999", 2, 0), '`coordinator` must be "host:port"'),
        (("host:1", None, 0), "`num_processes` must be an integer of at least 1"),
        (("host:1", 0, 0), "`num_processes` must be an integer of at least 1"),
        (("host:1", 2, None), "`process_id` must be an integer of at least 0"),
        (("host:1", 2, 2), "`process_id` must be below the number of processes, 2"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize(*arguments)


def test_one_process_has_nobody_to_meet(connected):
    initialize(num_processes=1)
    assert not connected


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_ID": "353", "SLURM_STEP_ID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("tpu7", "tpu7"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("a-1,a-2", "a-1"),
        ("n[7,9]-ib", "n7-ib"),
        ("rack[1-2]n[03,5],x", "rack1n03"),
    ],
)
def test_slurm(monkeypatch, nodes, first):
    for name, value in {**SLURM, "SLURM_STEP_NODELIST": nodes}.items():
        monkeypatch.setenv(name, value)
    # Job 353 and step 1 are 2 more than 352 jobs, of 64 ports each.
    with pytest.raises(TimeoutError, match=f"at {first}:{10240 + 2 * 64} within 0.01 s.*3 of 4"):
        initialize(timeout=0.01)


def test_slurm_with_one_task(connected, monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    initialize()
    assert not connected


def test_kubernetes_and_what_is_given_comes_first(monkeypatch, port):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    with pytest.raises(TimeoutError, match="process 2 of 4"):
        initialize(f"127.0.0.1:{port}", 4, timeout=0.01)
    with pytest.raises(TimeoutError, match="process 1 of 4"):
        initialize(f"127.0.0.1:{port}", 4, 1, timeout=0.01)


class TestLaunch:
    PROGRAM = "import sys; print(__name__, sys.argv)"

    def test_runs_a_file_with_its_arguments(self, tmp_path, capsys):
        (tmp_path / "beside.py").write_text("word = 'found'")
        program = tmp_path / "program.py"
        program.write_text(self.PROGRAM + "; import beside; print(beside.word)")
        launch.main(["--processes", "1", str(program), "--epochs", "3"])
        words = f"__main__ ['{program}', '--epochs', '3']\nfound\n"
        assert capsys.readouterr().out == words

    def test_runs_a_module(self, tmp_path, capsys, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "launched_module.py").write_text(self.PROGRAM)
        launch.main(["--processes", "1", "-m", "launched_module", "-m", "x"])
        name, arguments = capsys.readouterr().out.split(" ", 1)
        assert name == "__main__" and arguments.endswith("'-m', 'x']\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--processes", "1", "nothing.py"], "`PROGRAM` must be a file. Received: nothing.py"),
            (["--processes", "2", __file__], "error: `--process-id` must be an integer"),
            (
                ["--coordinator", "h:1", "--processes", "2", "--process-id", "2", __file__],
                "error: `--process-id` must be below the number of processes, 2",
            ),
        ],
    )
    def test_bad_input(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as stopped:
            launch.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="threads of JAX's XLA")
@pytest.mark.parametrize(("given", "threads"), [(None, 32), ("", 32), ("2", 2)])
def test_threads_of_devices_that_wait(given, threads, monkeypatch):
    """With too few, two processes of two devices each wait without end, now and then."""
    import jax

    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: None)
    monkeypatch.setattr(cluster, "_cores", lambda: 2)
    monkeypatch.setenv("PJRT_NPROC", "1")
    if given is None:
        monkeypatch.delenv("PJRT_NPROC")
    else:
        monkeypatch.setenv("PJRT_NPROC", given)
    CONNECT(["127.0.0.1:1"], "127.0.0.1:1", 2, 0, 300)
    assert os.environ["PJRT_NPROC"] == str(threads)
