"""The table of planted faults fits the source; `python -m tests.mutations` runs them."""

import pytest

from tests.mutations.__main__ import FAULTS, read
from tests.mutations.fault import ROOT


def test_there_are_enough():
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_fits_its_file(fault):
    text, planted = fault.plant(ROOT)
    assert text != planted
    compile(planted, fault.file, "exec")
    assert fault.mirror() or fault.tests
    for path in fault.tests:
        assert (ROOT / path.partition("::")[0]).exists(), path


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "2 passed in 1.0s", ("passed", "")),
        (0, "2 skipped in 1.0s", ("invalid", "exit code 0 of pytest")),
        (1, "FAILED a.py::test[x y] - assert 1 == 2", ("failed", "a.py::test[x y]")),
        (1, "ERROR a.py::test - OSError", ("failed", "a.py::test")),  # in a fixture
        (1, "ERROR a.py - NameError: name", ("invalid", "a.py")),  # while collecting
        (2, "ERROR a.py - NameError: name", ("invalid", "a.py")),
        (-11, "", ("failed", "exit code -11 of pytest")),
        (5, "no tests ran in 1.0s", ("invalid", "exit code 5 of pytest")),
    ],
)
def test_reads_what_pytest_prints(code, output, expected):
    assert read(code, output) == expected
