"""A model's mixtures of experts, and what their routers do with given inputs."""

from keras import ops

from keras_moe.moe import MixtureOfExperts, watching


def mixtures(model):
    """The `MixtureOfExperts` layers of a model, by name.

    Args:
        model: a Keras model or layer.

    Returns:
        Dictionary from name to layer, in the order of the model. Layers of one name are told apart
        by their paths, and by a number where those are equal too.
    """
    layers = [
        layer
        for layer in model._flatten_layers(include_self=True)
        if isinstance(layer, MixtureOfExperts)
    ]
    names = [layer.name for layer in layers]
    result = {}
    for layer in layers:
        name = layer.name if names.count(layer.name) == 1 else layer.path
        same = sum(other.path == layer.path for other in result.values())
        result[f"{name}_{same}" if same else name] = layer
    return result


def routings(model, inputs, training=False):
    """Who goes where: the routings of all of a model's mixtures, for these inputs.

    The model is called as it stands, not compiled. Nothing that counts is changed: neither losses
    nor the figures of `keras_moe.callbacks.RoutingMetrics`.

    Example:

    ```python
    for name, routing in keras_moe.routings(model, x[:64]).items():
        print(name, keras_moe.metrics.expert_tokens(routing))
    ```

    Args:
        model: a Keras model or layer.
        inputs: what it is called with, a batch.
        training: whether it is called as in training, with its capacities, its noise and dropout;
            routers then learn what they learn from a call, thresholds and biases.

    Returns:
        Dictionary from the names of `mixtures` to `Routing`s of NumPy arrays. A layer that is
        called several times has its last routing, one that is not called none.
    """
    with watching() as watched:
        model(inputs, training=training)
    layers = mixtures(model)
    return {
        name: _numpy(watched[id(layer)]) for name, layer in layers.items() if id(layer) in watched
    }


def _numpy(value):
    if isinstance(value, tuple):
        return type(value)(*map(_numpy, value))
    return None if value is None else ops.convert_to_numpy(value)
