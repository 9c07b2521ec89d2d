"""Which module's output goes into which, traced through NeuMF and through small models."""

from __future__ import annotations

import pytest
import torch
from helpers_quant import all_pairs, small_model
from torch import nn
from torch.nn import functional as F

from distiller.graph import ModuleCall, module_graph
from distiller.modules import Concat, EltwiseAdd

TOWERS = {
    "mf_user_embed": ([None], ["mf_mult"]),
    "mf_item_embed": ([None], ["mf_mult"]),
    "mlp_user_embed": ([None], ["mlp_concat"]),
    "mlp_item_embed": ([None], ["mlp_concat"]),
    "mlp_concat": (["mlp_user_embed", "mlp_item_embed"], ["mlp.0"]),
    "mlp.0": (["mlp_concat"], ["mlp_relu.0"]),
    "mlp_relu.0": (["mlp.0"], ["mlp.1"]),
    "mlp.1": (["mlp_relu.0"], ["mlp_relu.1"]),
}
JOINED = TOWERS | {
    "mf_mult": (["mf_user_embed", "mf_item_embed"], ["final_concat"]),
    "mlp_relu.1": (["mlp.1"], ["final_concat"]),
    "final_concat": (["mf_mult", "mlp_relu.1"], ["final"]),
    "final": (["final_concat"], ["sigmoid"]),
    "sigmoid": (["final"], [None]),
}
SPLIT = TOWERS | {
    "mf_mult": (["mf_user_embed", "mf_item_embed"], ["final_mf"]),
    "mlp_relu.1": (["mlp.1"], ["final_mlp"]),
    "final_mf": (["mf_mult"], ["final_add"]),
    "final_mlp": (["mlp_relu.1"], ["final_add"]),
    "final_add": (["final_mf", "final_mlp"], ["sigmoid"]),
    "sigmoid": (["final_add"], [None]),
}


def edges(graph: dict[str, ModuleCall]) -> dict[str, tuple]:
    return {name: (call.inputs, call.consumers) for name, call in graph.items()}


@pytest.mark.parametrize("flag", [True, torch.tensor(True)])
@pytest.mark.parametrize(("split", "expected"), [(False, JOINED), (True, SPLIT)])
def test_neumf(split, expected, flag):
    model = small_model(0, split)
    graph = module_graph(model, (*all_pairs(model), flag))
    assert edges(graph) == expected
    assert all(call.calls == 1 for call in graph.values())
    order = list(graph)
    for name, (sources, _) in expected.items():
        assert all(order.index(source) < order.index(name) for source in sources if source)


@pytest.mark.parametrize("arguments", [(), (False,), (torch.tensor(False),)])
def test_neumf_without_its_sigmoid(arguments):
    model = small_model(0)
    graph = module_graph(model, (*all_pairs(model), *arguments))
    expected = {name: edge for name, edge in JOINED.items() if name != "sigmoid"}
    assert edges(graph) == expected | {"final": (["final_concat"], [None])}


def test_tracing_leaves_the_model_as_it_was():
    model = small_model(0).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    module_graph(model, (*all_pairs(model), True))
    assert dict(model.named_modules()) == modules
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class Net(nn.Module):
    """Four layers; ``how`` says how they are joined."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.add, self.how = EltwiseAdd(), how

    def forward(self, *args):
        return self.how(self, *args)


class One(Net):
    def forward(self, x):
        return self.how(self, x)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            lambda m, x: m.c(m.b(m.a(x))),
            {"a": ([None], ["b"]), "b": (["a"], ["c"]), "c": (["b"], [None])},
        ),
        (
            lambda m, x: (lambda y: m.add(m.b(y), m.c(y)))(m.a(x)),
            {
                "a": ([None], ["b", "c"]),
                "b": (["a"], ["add"]),
                "c": (["a"], ["add"]),
                "add": (["b", "c"], [None]),
            },
        ),
        # a function in between is no module: nobody knows what it does to the values
        (lambda m, x: m.b(F.relu(m.a(x))), {"a": ([None], [None]), "b": ([None], [None])}),
        (lambda m, x: m.b(m.a(x).view(-1, 3)), {"a": ([None], [None]), "b": ([None], [None])}),
        (lambda m, x: m.b(m.a(x) + 1), {"a": ([None], [None]), "b": ([None], [None])}),
        # returned beside what is made of it
        (
            lambda m, x: (lambda y: (m.b(y), y))(m.a(x)),
            {"a": ([None], ["b", None]), "b": (["a"], [None])},
        ),
        # read by a module and by a function
        (
            lambda m, x: (lambda y: m.b(y) * y.mean())(m.a(x)),
            {"a": ([None], ["b", None]), "b": (["a"], [None])},
        ),
        # the model's input beside a module's output
        (
            lambda m, x: m.add(x, m.a(x)),
            {"a": ([None], ["add"]), "add": ([None, "a"], [None])},
        ),
        # thrown away
        (lambda m, x: (m.a(x), m.b(x))[1], {"a": ([None], []), "b": ([None], [None])}),
    ],
)
def test_joins(how, expected):
    graph = module_graph(One(how), (X,))
    assert {name: (call.inputs, sorted(call.consumers, key=str)) for name, call in graph.items()} == {
        name: (inputs, sorted(consumers, key=str)) for name, (inputs, consumers) in expected.items()
    }


def test_a_module_called_twice_counts_twice():
    graph = module_graph(One(lambda m, x: m.b(m.a(m.a(x)))), (X,))
    assert (graph["a"].calls, graph["b"].calls) == (2, 1)
    assert sorted(graph["a"].consumers) == ["a", "b"]


def test_modules_inside_modules_have_their_whole_names():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.ModuleDict({"last": nn.Tanh()})["last"]
    )
    graph = module_graph(model, (X,))
    assert edges(graph) == {"0.0": ([None], ["0.1"]), "0.1": (["0.0"], ["1"]), "1": (["0.1"], [None])}


def test_one_argument_needs_no_tuple():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert edges(module_graph(model, X)) == edges(module_graph(model, (X,)))


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.join = nn.Linear(3, 3), nn.Linear(3, 3), Concat()

    def forward(self, x, both=False, times=1):
        y = self.a(x)
        for _ in range(times - 1):
            y = y * 2
        if both:
            return self.join(y, self.b(x))
        return y


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((X,), ["a"]),
        ((X, False), ["a"]),
        ((X, True), ["a", "b", "join"]),
        ((X, torch.tensor(True)), ["a", "b", "join"]),
        ((X, torch.tensor(False)), ["a"]),
        ((X, True, 3), ["a", "b", "join"]),
    ],
)
def test_arguments_that_are_no_tensors_are_taken_as_they_stand(arguments, names):
    assert list(module_graph(Switched(), arguments)) == names


def test_a_bool_tensor_of_many_values_is_an_ordinary_input():
    model = One(lambda m, x: m.a(x.float()))
    assert list(module_graph(model, (torch.ones(2, 3, dtype=torch.bool),))) == ["a"]


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.b(x) if x.sum() > 0 else m.a(x),
        lambda m, x: next(m.a(row) for row in x),
        lambda m, x: m.a(x) * int(x.sum()),
        lambda m, x: m.a(x) * float(x.mean()),
        lambda m, x: m.a(x[: len(x)]),
        lambda m, x: next(m.a(x) for _ in range(x.shape[0])),
        lambda m, x: m.a(x) if bool(x.any()) else x,
        lambda m, x: m.a(torch.tensor(x.tolist())),
    ],
    ids=["if", "for", "int", "float", "len", "range", "bool", "tolist"],
)
def test_a_forward_that_depends_on_values_is_a_value_error(how):
    with pytest.raises(ValueError, match="trace"):
        module_graph(One(how), (X,))
