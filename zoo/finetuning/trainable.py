"""Which weights a run trains, and a network that remembers LoRA's."""

import h5py
import keras

from keras_moe import MixtureOfExperts

# Of a model with experts; "all" and "lora" are for any.
OF_EXPERTS = ("frozen_experts", "non_experts", "experts")
TRAIN = ("all", *OF_EXPERTS, "lora")


def choose(classifier, train, lora_rank=None):
    """Leaves only some weights of a classifier trainable; its head always is.

    ST-MoE (Zoph et al. 2022, https://arxiv.org/abs/2202.08906, section 4.2) found that updating
    all but the mixtures' weights is about as good as updating all, and far better than updating the
    mixtures alone.

    Args:
        classifier: a `zoo.EncoderTextClassifier`.
        train: "all" weights; with "frozen_experts" all but the experts'; with "non_experts" all
            but the experts' and the routers'; with "experts" the mixtures' alone; with "lora"
            those that KerasHub's `enable_lora` adds to the queries and values.
        lora_rank: of "lora".
    """
    backbone = classifier.backbone
    if train == "lora":
        backbone.enable_lora(lora_rank)
        return
    mixtures = [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if isinstance(layer, MixtureOfExperts)
    ]
    frozen = {
        "all": [],
        "frozen_experts": [w for layer in mixtures for w in layer.experts.weights],
        "non_experts": [
            w for layer in mixtures for w in (*layer.experts.weights, *layer.router.weights)
        ],
        "experts": _but(backbone.weights, [w for layer in mixtures for w in layer.weights]),
    }[train]
    for weight in frozen:
        weight.trainable = False


def _but(weights, others):
    others = set(map(id, others))
    return [weight for weight in weights if id(weight) not in others]


class Network(keras.Model):
    """A model whose files of weights have LoRA's factors, too.

    Keras writes the product of the factors into the kernels and forgets them, and training could
    not go on: both are zero then, and so are their gradients.

    Args:
        As `keras.Model` for a functional model.
    """

    def save_weights(self, filepath, **options):
        super().save_weights(filepath, **options)
        with h5py.File(filepath, "a") as file:
            for number, layer in enumerate(self._adapted()):
                for name in ("a", "b"):
                    factor = getattr(layer, f"lora_kernel_{name}")
                    file[f"lora/{number}/{name}"] = keras.ops.convert_to_numpy(factor)

    def load_weights(self, filepath, **options):
        layers = self._adapted()
        kernels = [keras.ops.convert_to_numpy(layer._kernel) for layer in layers]
        super().load_weights(filepath, **options)
        if not layers:
            return
        with h5py.File(filepath) as file:
            for number, (layer, kernel) in enumerate(zip(layers, kernels, strict=True)):
                layer._kernel.assign(kernel)  # the preset's, without the product
                layer.lora_kernel_a.assign(file[f"lora/{number}/a"][()])
                layer.lora_kernel_b.assign(file[f"lora/{number}/b"][()])

    def _adapted(self):
        layers = self._flatten_layers(include_self=False)
        return [layer for layer in layers if getattr(layer, "lora_enabled", False)]
