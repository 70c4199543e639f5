"""A few mutants of each kind of folder; `python -m tests.damage` has many more."""

import numpy as np
import pytest

from tests import damage

COUNT = 60


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return list(damage.campaign(COUNT, 0, tmp_path_factory.mktemp("damage")))


def test_damage_is_harmless_or_refused_by_name(outcomes):
    faults = [outcome for outcome in outcomes if outcome.is_fault]
    assert not faults, "\n".join(map(str, faults))
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts.count("refused") > COUNT // 3 and verdicts.count("equal") > COUNT // 10
    assert {outcome.base for outcome in outcomes} == {
        *("preset", "unchecked preset", "switch", "mixtral", "olmoe", "keras")
    }


@pytest.mark.parametrize(
    ("load", "names", "known", "verdict"),
    [
        (lambda folder: np.zeros(2), (), True, "equal"),
        (lambda folder: np.ones(2), (), True, "WRONG OUTPUTS"),
        (lambda folder: np.zeros(3), (), True, "WRONG OUTPUTS"),
        (lambda folder: np.ones(2), (), False, "unknowable"),
        (lambda folder: {}["a"], (), True, "KeyError"),
        (lambda folder: int("a"), (), True, "NOT NAMED"),
        (lambda folder: int("a"), ("'a'",), True, "refused"),
        (lambda folder: damage.pathlib.Path("a\nfile\0").stat(), (), True, "NOT NAMED"),
    ],
)
def test_verdicts(tmp_path, load, names, known, verdict):
    base = damage.Base("it", tmp_path, load, np.zeros(2))
    outcome = damage.judge(base, tmp_path, damage.Damage("kind", "file", names, known))
    assert outcome.verdict == verdict
    assert outcome.is_fault == (verdict not in ("equal", "refused", "unknowable"))
