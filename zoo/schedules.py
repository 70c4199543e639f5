"""Learning rates."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="zoo")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a line for `warmup_steps`, then falls with one over the square root of the step.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), appendix C, with 1,000 steps of warm-up.

    Args:
        peak: the rate at the end of the warm-up, the highest.
        warmup_steps: integer.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, peak, warmup_steps=1000):
        if peak <= 0:
            raise ValueError(f"`peak` must be a positive number. Received: peak={peak}")
        if warmup_steps < 1:
            raise ValueError(
                f"`warmup_steps` must be a positive integer. Received: warmup_steps={warmup_steps}"
            )
        self.peak = peak
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        share = (ops.cast(step, "float32") + 1.0) / self.warmup_steps  # Keras counts from 0
        return self.peak * ops.minimum(share, ops.rsqrt(share))

    def get_config(self):
        return {"peak": self.peak, "warmup_steps": self.warmup_steps}
