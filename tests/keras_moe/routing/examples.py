"""What the tests of the routers share."""

import numpy as np


def with_identity(router, scale=1.0):
    """The router's logits are now its input."""
    router.build((None, None, router.num_experts))
    router.kernel.assign(scale * np.eye(router.num_experts))
    return router


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, "float32"))


# One group of four tokens and three experts; the order of preference of each token:
#   token 0: 0 1 2    token 1: 0 1 2    token 2: 0 2 1    token 3: 1 0 2
P = [[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.3, 0.6, 0.1]]]
