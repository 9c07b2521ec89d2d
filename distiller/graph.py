"""Which module's output goes into which module."""

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
    """A leaf module's place in the graph.

    Attributes:
        inputs: For each tensor input, the name of the module it comes from; None where it is an input of the
            model or the result of a function.
        consumers: The names of the modules that read the output; None for each other use of it.
        calls: How often the forward calls the module.
    """

    inputs: list[str | None] = field(default_factory=list)
    consumers: list[str | None] = field(default_factory=list)
    calls: int = 0


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no modules in it."""
    return not any(module.children())


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without children by name, in the order of ``named_modules``."""
    return {name: module for name, module in model.named_modules() if is_leaf(module)}


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def module_graph(model: nn.Module, dummy_input: Any) -> dict[str, ModuleCall]:
    """Trace a model's forward.

    Args:
        model: Its forward may branch on arguments that are not tensors, or on (0-dimensional) bool tensors:
            these are taken as they stand in ``dummy_input``, or at their defaults.
        dummy_input: The forward's arguments, or the only one.

    Returns:
        Leaf modules by name, in the order of their first call.

    Raises:
        ValueError: the forward depends on the values of its tensors and so has no one graph.
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
    # A forward that looks into its tensors fails in whatever way it does when it finds none.
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
    """How many columns a module puts out, by name; None where its kind does not say."""
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
