"""Values of variables on disk, on JAX: Orbax, each process writing and reading its shards."""

import jax

try:
    import orbax.checkpoint as orbax
except ImportError as error:
    raise ImportError(
        "`ShardedBackup` needs the package 'orbax-checkpoint' on JAX, which "
        "`pip install 'keras-moe[checkpoints]'` installs."
    ) from error


def write(folder, variables):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {name: v.value for name, v in variables.items()})


def read(folder, variables):
    """Each device gets its part, wherever the file's parts were."""
    targets = {
        name: jax.ShapeDtypeStruct(v.value.shape, v.value.dtype, sharding=v.value.sharding)
        for name, v in variables.items()
    }
    with orbax.StandardCheckpointer() as checkpointer:
        values = checkpointer.restore(folder, targets)
    for name, variable in variables.items():
        variable.assign(values[name])
