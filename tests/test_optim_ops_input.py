"""The optimizers' ops refuse what does not go together, before anything is written."""

import copy

import pytest
import torch

from support.common import calls
from support.optim_table import ADAM, RMSPROP, SGD, flat, ops


@ops
def test_requires_grad(op):
    p, *rest = op.group(torch.randn(5))
    p = [torch.nn.Parameter(p[0])]
    with pytest.raises(RuntimeError, match=rf"{op}: .*torch.no_grad"):
        op([p, *rest])
    loss = (p[0] * p[0]).sum()
    with torch.no_grad():
        op([p, *rest])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ops
def test_inference_mode(op):
    with torch.inference_mode():
        lists = op.group(torch.randn(5))
        with calls([op.name]):
            op(lists)
    before = copy.deepcopy(lists)
    with pytest.raises(RuntimeError, match="inference tensor"), torch.no_grad():
        op(lists)
    assert all(torch.equal(*pair) for pair in zip(flat(lists), flat(before)))


LIST_FAULTS = [
    lambda x: x[:2],
    lambda x: [*x, x[0]],
    lambda x: [],
    lambda x: [*x[:2], None],
    lambda x: [*x[:2], x[2].to("meta")],
    lambda x: [*x[:2], x[2].to_sparse()],
]
TENSOR_FAULTS = [
    *LIST_FAULTS,
    lambda x: [*x[:2], x[2][:3]],
    lambda x: [*x[:2], torch.zeros(7, 7)],
    lambda x: [*x[:2], x[2].int()],
    lambda x: [*x[:2], x[2].double()],
]
STEP_FAULTS = [*LIST_FAULTS, lambda x: [*x[:2], torch.zeros(2)], lambda x: [*x[:2], 3.0]]


@ops
def test_bad_lists(op):
    """A fault in the last of three tensors, in any list, is found before the first is written."""
    options = op.options[-1]
    lists = op.group(*(torch.randn(7) for _ in range(3)), options=options)

    def refused(which, changed, error=RuntimeError):
        got = [*lists[:which], changed, *lists[which + 1 :]]
        before = [(x.clone(), x._version) for x in flat(lists)]
        with pytest.raises(error, match=rf"{op}|single memory location"):
            op(got, options)
        for x, (value, version) in zip(flat(lists), before):
            assert torch.equal(x, value) and x._version == version

    for which, tensors in enumerate(lists):
        are_steps = op.counts and which == len(lists) - 1
        for fault in STEP_FAULTS if are_steps else TENSOR_FAULTS:
            refused(which, fault(tensors))
        if are_steps:
            refused(which, [*tensors[:2], torch.tensor(1j)], NotImplementedError)
        elif which != 1:  # written
            refused(which, [*tensors[:2], tensors[2][:1].expand(7)])


@pytest.mark.parametrize("op, which", [(SGD, 2), (RMSPROP, 3), (RMSPROP, 4)])
def test_list_of_an_option_that_is_off(op, which):
    lists = op.group(torch.randn(7))
    lists[which] = [torch.randn(7)]
    with pytest.raises(RuntimeError, match=f"{op}: {op_list(op, which)} must be empty"):
        op(lists)


def op_list(op, which):
    return getattr(torch.ops.dlkernels, op.name).default._schema.arguments[which].name


BAD_SCALARS = (
    torch.ones(2),
    torch.ones(0),
    torch.ones(1).to_sparse(),
    torch.ones((), device="meta"),
)


def test_bad_device_lr():
    for scalar in BAD_SCALARS:
        with pytest.raises(RuntimeError, match="adam_: device_lr"):
            ADAM(ADAM.group(torch.randn(7)), device_lr=scalar)


@ops
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_bad_scalars(op, name):
    lists = op.group(torch.randn(7))
    for scalar in BAD_SCALARS:
        with pytest.raises(RuntimeError, match=f"{op}: {name}"):
            op(lists, **{name: scalar})
    with pytest.raises(RuntimeError, match=r"grads|single memory location"):
        p, g, *rest = lists
        op([p, [g[0][:1].expand(7)], *rest], grad_scale=torch.ones(()))
    with pytest.raises(NotImplementedError, match=f"{op}: params"):
        op([[x.to(torch.complex64) for x in tensors] for tensors in lists])
    for value in (float("nan"), float("inf"), 0.0, -1.0, 1e300):  # no crash
        options = {k: value for k, v in op.defaults.items() if isinstance(v, float)}
        op(op.group(torch.randn(7), options=options), options)
