"""What `recorded` is on PyTorch: the operations of a function as a graph, run one after another."""

import threading

import torch
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

TRACING = "value out of a tracing tensor"  # what PyTorch says where its C++ looks
LOOKS = "A function that looks at what a tensor holds cannot be recorded"
LOOKS_AT = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
LOOKS_AT |= {getattr(torch.Tensor, f"__{kind}__") for kind in ("bool", "int", "float", "index")}
aten = torch.ops.aten
MOST = 16  # recordings of one function
CONVERSIONS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}


RECORDING = threading.RLock()  # one thread at a time, which others' operations do not disturb


class Recorded:
    """What `recorded` returns."""

    def __init__(self, function):
        self.function = function
        self.recordings = {}

    def __call__(self, *arguments):
        leaves = tree_leaves(arguments)
        kind = tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)
        with RECORDING:
            run = self._of_kind(kind, arguments)
        with torch.inference_mode():
            return run(*arguments)

    def _of_kind(self, kind, arguments):
        """What is run for such arguments; a recording takes longer to make than many calls do."""
        if kind in self.recordings:
            run = self.recordings.pop(kind) or self._record(arguments)
            self.recordings[kind] = run  # as the one used last
            return run
        if len(self.recordings) == MOST:
            del self.recordings[next(iter(self.recordings))]
        self.recordings[kind] = None
        return self.function

    def _record(self, arguments):
        def function(*arguments):
            with _NoLook():
                return self.function(*arguments)

        try:
            # Of what may be written into. What is expanded, and stays so, may not.
            copies = tree_map(lambda x: x.clone() if x.is_contiguous() else x, arguments)
            recording = make_fx(function, pre_dispatch=True)(*copies)
        except RuntimeError as error:  # not of a class of its own: Keras makes a new one of it
            if LOOKS not in str(error) and TRACING not in str(error):
                raise
            return self.function
        if any(_has_a_shape_of_its_own(node) for node in recording.graph.nodes):
            return self.function
        return _simplified(recording)


class _NoLook(TorchFunctionMode):
    """Within, what a tensor holds may not become a number of Python's, which would be recorded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in LOOKS_AT:
            raise RuntimeError(LOOKS)
        return function(*args, **(kwargs or {}))


def _has_a_shape_of_its_own(node):
    """Whether the shape of what a node returns depends on numbers; Python may have gone by it."""
    if not isinstance(node.target, OpOverload) or (
        torch.Tag.dynamic_output_shape not in node.target.tags
    ):
        return False
    # Of what is done here only `take_rows` asks where numbers are, to fill rows there.
    columns = list(node.users)
    users = [user.target for column in columns for user in column.users]
    return not (
        node.target is aten.nonzero.default
        and all(column.target is aten.select.int for column in columns)
        and all(user is aten.index_fill_.int_Scalar for user in users)
    )


def _simplified(recording):
    """Without conversions to what a tensor is already, and what is always the same made once."""
    constants, changed = {}, _changed_in_place(recording.graph)
    for node in recording.graph.nodes:
        if node.op == "get_attr":
            value = getattr(recording, node.target)
            if not isinstance(value, torch.nn.Parameter):
                constants[node] = value
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if _changes_nothing(recording, node):
            node.replace_all_uses_with(node.args[0])
        elif node not in changed and _is_constant(node, constants):
            of_value = torch.fx.node.map_arg((node.args, node.kwargs), constants.get)
            constants[node] = node.target(*of_value[0], **of_value[1])
            name = f"_constant_{node.name}"
            recording.register_buffer(name, constants[node])
            with recording.graph.inserting_before(node):
                made = recording.graph.get_attr(name)
            node.replace_all_uses_with(made)
            constants[made] = constants[node]
    recording.graph.eliminate_dead_code()
    recording.recompile()
    return recording


def _changed_in_place(graph):
    """The nodes whose tensors, or views of them, are written into or returned."""
    changed = set()
    for node in reversed(graph.nodes):
        arguments = []
        if node.op == "output" or not isinstance(node.target, OpOverload):
            arguments = node.all_input_nodes
        else:
            for given, argument in zip(node.args, node.target._schema.arguments, strict=False):
                alias = argument.alias_info
                if alias is not None and (alias.is_write or node in changed):
                    arguments.append(given)
        changed.update(each for each in arguments if isinstance(each, torch.fx.Node))
    return changed


def _is_constant(node, constants):
    return (
        all(each in constants for each in node.all_input_nodes)
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and isinstance(node.meta.get("val"), torch.Tensor)
    )


def _changes_nothing(recording, node):
    """Whether a node is a conversion to the dtype and device that its tensor has, and no copy."""
    options = {"copy", "memory_format"} & set(node.kwargs)
    if node.target not in CONVERSIONS or options or len(node.args) > 3:
        return False
    values = [
        getattr(recording, each.target) if each.op == "get_attr" else each.meta.get("val")
        for each in (node, node.args[0])
    ]
    tensors = all(isinstance(value, torch.Tensor) for value in values)
    return tensors and values[0].dtype == values[1].dtype and values[0].device == values[1].device
