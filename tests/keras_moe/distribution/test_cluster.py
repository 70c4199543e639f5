"""Processes that meet, each a thread here; JAX's connections are replaced by a record of them."""

import contextlib
import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest

from keras_moe import launch
from keras_moe.distribution import initialize

if keras.backend.backend() != "jax":
    pytest.skip("processes meet alike on TensorFlow, and not on PyTorch", allow_module_level=True)

import jax

pytestmark = pytest.mark.every_backend


@pytest.fixture(autouse=True)
def connected(monkeypatch):
    """Arguments of `jax.distributed.initialize`, by process."""
    found = {}

    def connect(coordinator, num_processes, process_id, **options):
        found[process_id] = (coordinator, num_processes)

    monkeypatch.setattr(jax.distributed, "initialize", connect)
    monkeypatch.setenv("PJRT_NPROC", "32")
    for name in ("SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_enable_preemption_service
    yield found
    jax.config.update("jax_enable_preemption_service", before)


@pytest.fixture(autouse=True)
def seeds(monkeypatch):
    """Seeds that the processes were given."""
    found = []
    monkeypatch.setattr(keras.utils, "set_random_seed", found.append)
    return found


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


def test_all_learn_the_addresses_and_one_seed(connected, seeds, port):
    """Process 1 of 3 is the test: it reads what the others are told."""
    address = f"127.0.0.1:{port}"
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(together, (address, 3, 2, 20), (address, 3, 0, 20))
        with connected_to(port) as talk:
            words = talk.makefile()
            talk.sendall(hello(1, 3))
            told = json.loads(words.readline())
            talk.sendall(b'{"heard": true}\n')
            assert json.loads(words.readline()) == {"go": True}
        assert others.result() == [None, None]
    assert told["addresses"] == [f"127.0.0.1:{port + i}" for i in range(3)]
    assert seeds == [told["seed"]] * 2
    assert connected == {0: (address, 3), 2: (address, 3)}
    with socket.create_server(("127.0.0.1", port)):
        pass  # it is free again, for the backend


def test_all_are_told_who_is_missing(connected, port):
    address = f"127.0.0.1:{port}"
    errors = together((address, 4, 0, 1.0), (address, 4, 2, 1.0))
    for error in errors:
        assert type(error) is TimeoutError
        assert f"4 processes must come to {address}" in str(error)
        assert str(error).endswith("1, 3")
    assert not connected


def test_a_coordinator_that_is_not_there(connected, port):
    with pytest.raises(TimeoutError, match=f"127.0.0.1:{port} .*process 1 of 2"):
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


def hello(process_id, num_processes):
    """How a process greets process 0."""
    words = {"run": ".", "num_processes": num_processes, "process_id": process_id}
    return json.dumps(words).encode() + b"\n"


def answer(port, words):
    """What process 0 says to these."""
    with connected_to(port) as talk:
        talk.sendall(words)
        return talk.makefile().readline()


@pytest.mark.parametrize("other", [(3, 1), (2, 0), (2, 7)], ids=str)
def test_processes_that_do_not_agree(port, other):
    """Process 0 of 2, and one that says that it is 1 of 3, 0 of 2 again, or 7 of 2."""
    num_processes, process_id = other
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(initialize, f"127.0.0.1:{port}", 2, 0, 20)
        told = json.loads(answer(port, hello(process_id, num_processes)))["value"]
        with pytest.raises(ValueError, match="`process_id`") as error:
            first.result()
    assert told == str(error.value)
    assert f"process_id={process_id}, num_processes={num_processes} from " in told


def test_a_process_that_comes_twice(port):
    """Process 1 of 3 is still there when another one says that it is 1 of 3."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(initialize, f"127.0.0.1:{port}", 3, 0, 20)
        with connected_to(port) as talk:
            talk.sendall(hello(1, 3))
            told = json.loads(answer(port, hello(1, 3)))
            assert "process_id=1, num_processes=3 from " in told["value"]
            with pytest.raises(ValueError, match="`process_id`"):
                first.result()
            assert json.loads(talk.makefile().readline()) == told


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
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(initialize, address, 3, 0, 20)
        gone = connected_to(port)
        gone.sendall(hello(1, 3))
        gone.close()
        last = pool.submit(initialize, address, 3, 2, 20)
        again = pool.submit(initialize, address, 3, 1, 20)
        assert [call.result() for call in (first, last, again)] == [None] * 3
    assert connected.keys() == {0, 1, 2}


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"`coordinator`.*:{port}"):
            initialize(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "`coordinator`.*None"),
        (("10.0.0.1", 2, 0), "`coordinator`.*10.0.0.1"),
        (("host:99999", 2, 0), "`coordinator`.*host:99999"),
        (("host:1", None, 0), "`num_processes`.*None"),
        (("host:1", 0, 0), "`num_processes`.*0"),
        (("host:1", 2, None), "`process_id`.*None"),
        (("host:1", 2, 2), "`process_id`.*2"),
        (("host:1", 2, 0, 0), "`timeout`.*0"),
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
    with pytest.raises(TimeoutError, match=f"{first}:{10240 + 2 * 64} .*process 3 of 4"):
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
            (["--processes", "1", "nothing.py"], "`PROGRAM`.*nothing.py"),
            (["--processes", "2", __file__], "`--process-id`.*None"),
            (
                ["--coordinator", "h:1", "--processes", "2", "--process-id", "2", __file__],
                "`--process-id`.*2",
            ),
        ],
    )
    def test_bad_input(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as stopped:
            launch.main(arguments)
        assert stopped.value.code == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("given", [None, "", "2"])
def test_devices_that_wait_for_each_other_have_threads(given, monkeypatch, port):
    """With too few, two processes of two devices each wait without end, now and then."""
    if given is None:
        monkeypatch.delenv("PJRT_NPROC")
    else:
        monkeypatch.setenv("PJRT_NPROC", given)
    address = f"127.0.0.1:{port}"
    assert together((address, 2, 0, 20), (address, 2, 1, 20)) == [None] * 2
    enough = max(32, len(os.sched_getaffinity(0)))
    assert int(os.environ["PJRT_NPROC"]) == (2 if given == "2" else enough)
