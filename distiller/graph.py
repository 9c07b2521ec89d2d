"""The graph of a model: which module's output goes into which module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from distiller.modules import Concat, EltwiseAdd, EltwiseMult

ELEMENT_BY_ELEMENT = (nn.Identity, nn.Dropout, nn.ReLU, nn.Sigmoid, nn.Tanh, EltwiseAdd, EltwiseMult)


@dataclass
class ModuleCall:
    """A leaf module's place in the graph of a model.

    Attributes:
        inputs: For each tensor input, the name of the module that it comes from; None if it is an input of the
            model or the result of a function.
        consumers: The names of the modules that read the output, and None for every other use of it.
        calls: The number of times that the forward calls the module.
    """

    inputs: list[str | None] = field(default_factory=list)
    consumers: list[str | None] = field(default_factory=list)
    calls: int = 0


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module has no submodules."""
    return not any(module.children())


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules without submodules by name, in the order of ``named_modules``."""
    return {name: module for name, module in model.named_modules() if is_leaf(module)}


class _LeafTracer(fx.Tracer):
    """A tracer that goes into every module that has submodules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the tracer records a module as one call, which it does if the module is a leaf."""
        return is_leaf(m)


def module_graph(model: nn.Module, dummy_input: Any) -> dict[str, ModuleCall]:
    """Trace a model's forward and return the graph of its leaf modules.

    Args:
        model: The model. Its forward may branch on arguments that are not tensors, and on 0-dimensional bool tensors;
            the trace takes these at their values in ``dummy_input``, or at their defaults.
        dummy_input: The forward's arguments as a tuple or list, or its only argument.

    Returns:
        The leaf modules' calls by name, in the order of their first call.

    Raises:
        ValueError: the forward depends on the values of its tensors, so that it has more than one graph.
    """
    arguments = dummy_input if isinstance(dummy_input, tuple | list) else (dummy_input,)
    bound = inspect.signature(model.forward).bind(*arguments)
    bound.apply_defaults()
    fixed = {}
    for name, value in bound.arguments.items():
        if not isinstance(value, Tensor):
            fixed[name] = value
        elif value.dtype == torch.bool and not value.dim():
            fixed[name] = bool(value)
    try:
        graph = _LeafTracer().trace(model, concrete_args=fixed)
    # A forward that reads values of tensors can fail in any way while it is traced, when there are none.
    except Exception as error:
        raise ValueError(f"the model's forward cannot be traced: {error}") from error

    def name_of(node: fx.Node) -> str | None:
        return node.target if node.op == "call_module" else None

    calls: dict[str, ModuleCall] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            call = calls.setdefault(node.target, ModuleCall())
            arguments = [*node.args, *node.kwargs.values()]
            call.inputs = [name_of(source) for source in arguments if isinstance(source, fx.Node)]
            call.consumers += [name_of(user) for user in node.users]
            call.calls += 1
    return calls


def output_widths(graph: Mapping[str, ModuleCall], modules: Mapping[str, nn.Module]) -> dict[str, int | None]:
    """Return the number of columns of every module's output by name; None if the module's type does not say."""
    widths: dict[str, int | None] = {}
    for name, call in graph.items():
        module, inputs = modules[name], [widths.get(source) for source in call.inputs]
        width = getattr(module, "embedding_dim", getattr(module, "out_features", None))
        if isinstance(module, Concat) and module.dim == 1 and all(inputs):
            width = sum(inputs)
        elif isinstance(module, ELEMENT_BY_ELEMENT):
            width = inputs[0]
        widths[name] = width
    return widths
