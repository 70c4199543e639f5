"""The table of planted faults fits the source; `python -m tests.mutations` runs them."""

import pytest

from tests.mutations.__main__ import FAULTS
from tests.mutations.fault import ROOT


def test_there_are_enough():
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_fits_its_file(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    assert fault.mirror() or fault.tests
    for path in fault.tests:
        assert (ROOT / path.partition("::")[0]).exists(), path
