"""dlkernels._C.direct: calls of our ops, with whatever arguments, as torch.ops makes them."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import dlkernels.functional as ours
from dlkernels import _C
from dlkernels._dispatch import direct

X, W, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
IMAGE, WINDOW = torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3)
CONV = (IMAGE, WINDOW, None, (1, 1), [1, 1, 1, 1], (1, 1), 1)
POOL = (IMAGE, (2, 2), [2, 2], (0, 0), (1, 1), False)
ARGUMENTS = {
    "linear": (X, W, None),
    "linear_relu": (X, W, B),
    "mlp": (X, [W], (B,)),
    "relu": (X,),
    "conv2d": CONV,
    "conv2d_relu": CONV,
    "conv2d_relu_max_pool2d": CONV,
    "max_pool2d": POOL,
    "max_pool2d_with_indices": POOL,
    "cross_entropy": (X, torch.tensor([0, 2]), None, 1, -100, 0.5),
}
every = pytest.mark.parametrize("op", ARGUMENTS)


class Subclass(torch.Tensor):
    pass


ODD = [
    None, True, 1, -1, 2**62, 2**70, 0.5, float("nan"), "1", b"1", object(), Ellipsis, Subclass,
    (), [], (1,), (1, 1), [True, 1], [1.5, 1], [2**70], [None], "11", [[1]], {1: 1}, range(2),
    torch.Size([1, 1]), X, X.double(), X.to_sparse(), X.as_subclass(Subclass), torch.tensor(1), [X],
    (X, None), [X, 1], torch.nn.Parameter(X), torch.empty(0), IMAGE, X.to("meta"),
    torch.nn.UninitializedParameter(),
]  # fmt: skip


def outcome(f, args):
    try:
        return repr(f(*args))
    except Exception as e:
        return repr(e)


def assert_alike(op, args):
    overload = getattr(torch.ops.dlkernels, op).default
    assert outcome(getattr(direct, op), args) == outcome(overload, args), args


@every
def test_usual_arguments(op):
    overload, args = getattr(torch.ops.dlkernels, op).default, ARGUMENTS[op]
    results = [f(*args) for f in (getattr(direct, op), overload)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert type(results[0]) is type(results[1])


class Refused:
    def __init__(self, overload):
        self._schema = overload._schema

    def __call__(self, *args):
        raise AssertionError("torch.ops was asked")


@every
def test_usual_arguments_go_past_torch_ops(op):
    refused = _C.direct(Refused(getattr(torch.ops.dlkernels, op).default))
    refused(*ARGUMENTS[op])
    with pytest.raises(AssertionError, match=r"torch\.ops was asked"):
        refused(X.as_subclass(Subclass), *ARGUMENTS[op][1:])


@every
def test_odd_arguments(op):
    args = ARGUMENTS[op]
    for i in range(len(args)):
        for odd in ODD:
            assert_alike(op, (*args[:i], odd, *args[i + 1 :]))


@every
def test_odd_numbers_of_arguments(op):
    args = ARGUMENTS[op]
    for n in range(len(args)):
        assert_alike(op, args[:n])
    assert_alike(op, (*args, 1))
    with pytest.raises(TypeError, match=op):  # which has no keywords
        getattr(direct, op)(input=X)


class Logged(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, f, types, args=(), kwargs=None):
        self.seen.append(f)
        return f(*args, **(kwargs or {}))


def test_function_modes_see_our_ops():
    with Logged() as log:
        ours.relu(X)
        ours.max_pool2d(IMAGE, 2)
    ops = torch.ops.dlkernels
    assert [f for f in log.seen if f in (ops.relu.default, ops.max_pool2d.default)] == [
        ops.relu.default,
        ops.max_pool2d.default,
    ]


def test_other_overloads():
    with pytest.raises(AttributeError):
        _C.direct(len)
    with pytest.raises(RuntimeError, match="no_such_op"):
        _C.direct(
            type("Op", (), {"_schema": type("Schema", (), {"name": "dlkernels::no_such_op"})})
        )
