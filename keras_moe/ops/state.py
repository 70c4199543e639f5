"""What a layer may do where a backend transforms or exports it."""

import keras


def keeps_statistics():
    """Whether a layer that is called adds to its statistics.

    `False` while PyTorch exports the layer or transforms it with `torch.func`: an exported program
    would write statistics that nobody reads, and a transformed function must not write at all. The
    other backends collect such changes beside the computation.
    """
    if keras.backend.backend() != "torch":
        return True
    from keras_moe.ops.torch_only import is_exporting, is_transforming

    return not is_exporting() and not is_transforming()


def check_can_loop(x, option):
    """Refuses a loop until a condition on tensors holds, where PyTorch cannot have one.

    Args:
        x: tensor that the condition depends on.
        option: text, the option that needs the loop.

    Raises:
        ValueError: if PyTorch maps or exports the function that runs.
    """
    if keras.backend.backend() != "torch":
        return
    from keras_moe.ops.torch_only import is_exporting, is_mapped

    if is_exporting() or is_mapped(x):
        raise ValueError(
            f"{option} is not supported in `torch.func.vmap` and in exported PyTorch programs, "
            "because the number of rounds depends on the scores. Use another backend, or leave "
            "the option out."
        )
