import keras
import pytest

import zoo


def test_rises_and_falls():
    rate = zoo.InverseSquareRoot(0.5, warmup_steps=4)
    # 1/4, 1/2, 3/4 and 4/4 of the peak; sqrt(4 / 16) at the 16th step, sqrt(4 / 64) at the 64th.
    steps = {0: 0.125, 1: 0.25, 2: 0.375, 3: 0.5, 15: 0.25, 63: 0.125}
    assert [float(rate(step)) for step in steps] == pytest.approx(list(steps.values()), rel=1e-6)


def test_in_an_optimizer_and_round_trip():
    optimizer = keras.optimizers.Adam(zoo.InverseSquareRoot(0.5, warmup_steps=4))
    assert float(optimizer.learning_rate) == pytest.approx(0.125)
    copy = keras.optimizers.Adam.from_config(optimizer.get_config())
    for step, rate in ((0, 0.125), (15, 0.25)):  # of no other peak and number of warmup steps
        copy.iterations.assign(step)
        assert float(copy.learning_rate) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "`peak`.*peak=0.0"),
        ((0.1, 0), "`warmup_steps`.*warmup_steps=0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.InverseSquareRoot(*arguments)
