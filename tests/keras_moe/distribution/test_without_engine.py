"""What PyTorch, which has no engine for several devices, says to a user who wants one."""

import keras
import pytest

from keras_moe.distribution import ExpertParallel, ShardedBackup, initialize

if keras.backend.backend() != "torch":
    pytest.skip("JAX and TensorFlow have engines", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("ExpertParallel", lambda folder: ExpertParallel()),
        ("initialize", lambda folder: initialize("127.0.0.1:1", 2, 0)),
        ("ShardedBackup", lambda folder: ShardedBackup(folder)),
    ],
)
def test_pytorch_raises(name, use, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`.*Received: the backend torch"):
        use(tmp_path)
