"""`python -m tests`."""

import pytest

from tests import __main__ as runner


@pytest.fixture
def ran(monkeypatch):
    """Runs the command line with pytest replaced; returns the exit code and what would have run."""

    def ran(*arguments, codes=()):
        calls, left = [], list(codes)

        def run(*call):
            calls.append(call)
            return left.pop(0) if left else 0

        monkeypatch.setattr(runner, "run", run)
        monkeypatch.setattr(runner.sys, "argv", ["tests", *arguments])
        return runner.main(), calls

    return ran


def test_runs_every_backend_by_default(ran):
    assert ran() == (0, [(name, False, []) for name in ("torch", "jax", "tensorflow")])


def test_backends_paths_and_arguments_of_pytest(ran):
    code, calls = ran("tensorflow", "tests/zoo", "jax", "--full", "--", "-k", "dispatch")
    arguments = ["tests/zoo", "-k", "dispatch"]
    assert (code, calls) == (0, [(name, True, arguments) for name in ("jax", "tensorflow")])


@pytest.mark.parametrize("word", ["numpy", "tests/nothing.py"])
def test_unknown_backend_or_path(ran, capsys, word):
    with pytest.raises(SystemExit) as stopped:
        ran(word)
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["jax", "xdist"])
def test_missing_package(ran, capsys, monkeypatch, name):
    find = runner.importlib.util.find_spec
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda x: x != name and find(x) or None)
    with pytest.raises(SystemExit) as stopped:
        ran()
    assert stopped.value.code == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    if name == "jax":
        assert ran("torch") == (0, [("torch", False, [])])


@pytest.mark.parametrize(
    ("codes", "expected", "backends"),
    [
        ((0, 0, 0), 0, 3),
        ((0, 1, 0), 1, 3),  # a failure does not stop the others
        ((-11, 0, 0), 1, 3),  # a crash
        ((0, 5, 5), 0, 3),  # no test is marked for the other backends
        ((5, 5, 5), 5, 3),
        ((2,), 1, 1),  # Ctrl-C stops the rest
    ],
)
def test_exit_code(ran, codes, expected, backends):
    code, calls = ran(codes=codes)
    assert (code, len(calls)) == (expected, backends)
