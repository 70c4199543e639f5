"""`model.fit` under `tf.distribute.MultiWorkerMirroredStrategy`, at which Keras 3.15 fails twice.

Before its first step it makes one batch of those of all replicas, for the shapes alone, by a mean
that this strategy takes of a tensor only, not of a batch of several. And it takes the mean of each
figure in the logs along an axis that a number does not have.
"""

from keras import tree
from keras.src.backend.tensorflow import trainer

_build, _reduce = trainer.TensorFlowTrainer._maybe_symbolic_build, trainer.reduce_per_replica
_many = trainer._collective_all_reduce_multi_worker


def mend():
    """Puts both right, in Keras; other strategies are as before."""
    trainer.TensorFlowTrainer._maybe_symbolic_build = _built_by_one_replica
    trainer.reduce_per_replica = _reduced


def _built_by_one_replica(model, iterator=None, data_batch=None):
    """With the shapes of the batch of this process's first replica."""
    if iterator is not None and _many(model._distribute_strategy):
        local = model.distribute_strategy.experimental_local_results
        _, _, batches = next(iter(iterator))
        data_batch = tree.map_structure(lambda x: local(x)[0], next(batches))
        iterator = None
    _build(model, iterator, data_batch)


def _reduced(values, strategy, reduction):
    """The mean over all replicas of all processes."""
    if reduction == "auto" and _many(strategy):
        return tree.map_structure(lambda x: strategy.reduce("MEAN", x, axis=None), values)
    return _reduce(values, strategy, reduction)
