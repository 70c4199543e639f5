"""What layers ask of a mesh; each backend's engine is a subclass."""

import abc


class Engine(abc.ABC):
    """Layouts, collectives and steps of one mesh.

    Args:
        size: devices along each axis of the mesh, "data", "expert" and "model".
        devices: their names, as many as that.
    """

    ROUTERS = ()  # names of the classes that run on this backend's devices; none: any
    GENERATES = True  # whether texts can be written on them

    def __init__(self, size, devices):
        self.size = size
        self.devices = devices
        self.batch_shards = size["data"] * size["expert"]

    def check(self, experts, path, router=None):
        """Raises a ValueError if the mesh cannot share a bank of experts, or run its router.

        Args:
            experts: the bank.
            path: of its layer, for the message.
            router: the layer's; `None`: it has none.
        """
        if router is not None and self.ROUTERS and type(router).__name__ not in self.ROUTERS:
            raise ValueError(
                f"`router` must be a {', '.join(self.ROUTERS)} on a mesh of this backend's "
                f"devices. Received: a {type(router).__name__} in the layer {path!r}"
            )
        if not hasattr(experts, "compute"):
            raise ValueError(
                "`experts` must have all kernels of a kind in one tensor to be shared by devices, "
                "as `FeedForwardExperts` and `LinearExperts` have. "
                f"Received: {type(experts).__name__} in the layer {path!r}"
            )
        if experts.num_experts % self.size["expert"]:
            raise ValueError(
                "`experts` of `ExpertParallel` must divide the number of experts of every layer. "
                f"Received: experts={self.size['expert']} for the {experts.num_experts} experts of "
                f"the layer {path!r}"
            )
        hidden_dim = getattr(experts, "hidden_dim", 0)
        if hidden_dim % self.size["model"]:
            raise ValueError(
                "`model` of `ExpertParallel` must divide the hidden width of every layer's "
                f"experts. Received: model={self.size['model']} for hidden_dim={hidden_dim} in the "
                f"layer {path!r}"
            )

    def check_generation(self):
        """Raises a ValueError where texts cannot be written on the mesh."""
        if not self.GENERATES:
            raise ValueError(
                "`generate` must be called outside of `ExpertParallel.scope()` on TensorFlow, "
                "whose DTensor has no rule for a cache. Received: a call within; save the weights, "
                "and load them into a model that was made outside"
            )

    @abc.abstractmethod
    def place(self, experts):
        """Remembers where weights go that have been made, but get their values later."""

    @abc.abstractmethod
    def exchange(self, experts, inputs, routing, training):
        """Tokens to their experts' devices, through the experts, and back: for a layer's call.

        Args:
            experts: a bank of experts that was built within the scope.
            inputs: `[groups, tokens, dim]` tensor.
            routing: a `Routing` of these tokens.
            training: boolean.

        Returns:
            `[groups, tokens, out]` tensor: what dispatch, experts and combine make on one device.
        """

    @abc.abstractmethod
    def spread(self, experts, inputs, training):
        """Slots to their experts' devices, through the experts, and back: for soft routing.

        Args:
            experts: a bank of experts that was built within the scope.
            inputs: `[groups, experts, slots, dim]` tensor.
            training: boolean.

        Returns:
            `[groups, experts, slots, out]` tensor.
        """

    @abc.abstractmethod
    def by_groups(self, function, *inputs):
        """See `active.by_groups`."""

    def gathered(self, x):
        """See `active.gathered`."""
        return x

    def seats_for_all(self, tokens):
        """See `active.seats_for_all`."""
        return None
