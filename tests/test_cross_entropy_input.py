"""cross_entropy: what it refuses, and how."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from support.common import assert_refused_alike

NAN, INF = float("nan"), float("inf")

BAD = {
    "batch": lambda x, t: ((x, t[:3]), {}),
    "batch of maps": lambda x, t: ((x.view(2, 3, 2), t[:3].view(3, 1)), {}),
    "rank of target": lambda x, t: ((x, t[:, None]), {}),
    "no target": lambda x, t: ((x, t[0]), {}),
    "size of maps": lambda x, t: ((x.view(2, 3, 2), t[:2].view(2, 1)), {}),
    "rank of maps": lambda x, t: ((x.view(2, 3, 2), t[:2]), {}),
    "rank of input": lambda x, t: ((x[0, 0], t), {}),
    "many targets for one": lambda x, t: ((x[0], t[:2]), {}),
    "class 3": lambda x, t: ((x, t + 3), {}),
    "class 3, smoothed": lambda x, t: ((x, t + 3), {"label_smoothing": 0.1}),
    "class 3, none": lambda x, t: (  # one class: any of PyTorch's threads may be the first to raise
        (x, torch.full_like(t, 3)),
        {"reduction": "none", "weight": torch.rand(3)},
    ),
    "class -1": lambda x, t: ((x, t - 1), {}),
    "class 2**40": lambda x, t: ((x, t + 2**40), {}),
    "class of a map": lambda x, t: ((x.view(2, 3, 2), torch.full((2, 2), 3)), {}),
    "class of none": lambda x, t: ((x[:, :0], t), {}),
    "weight size": lambda x, t: ((x, t, torch.rand(4)), {}),
    "batch and weight size": lambda x, t: ((x, t[:3], torch.rand(4)), {}),
    "weight rank": lambda x, t: ((x, t, torch.rand(3, 1)), {}),
    "weight size, probabilities": lambda x, t: ((x, x, torch.rand(4)), {}),
    "weight dtype": lambda x, t: ((x, t, torch.rand(3).double()), {}),
    "weight on meta": lambda x, t: ((x, t, torch.rand(3, device="meta")), {}),
    "weight with gradient": lambda x, t: ((x, t, torch.rand(3, requires_grad=True)), {}),
    "target on meta": lambda x, t: ((x, t.to("meta")), {}),
    "input on meta": lambda x, t: ((x.to("meta"), t), {}),
    "int32": lambda x, t: ((x, t.int()), {}),
    "int16": lambda x, t: ((x, t.short()), {}),
    "bool": lambda x, t: ((x, t.bool()), {}),
    "float target": lambda x, t: ((x, t.float()), {}),
    "uint8 maps": lambda x, t: ((x.view(2, 3, 2), t.view(2, 2).byte()), {}),
    "integer input": lambda x, t: ((x.long(), t), {}),
    "sparse target": lambda x, t: ((x, t.to_sparse()), {}),
    "classes for probabilities": lambda x, t: ((x, x.long()), {}),
    "probabilities, ignore_index": lambda x, t: ((x, x), {"ignore_index": 0}),
    "smoothing 1.5": lambda x, t: ((x, t), {"label_smoothing": 1.5}),
    "smoothing text": lambda x, t: ((x, t), {"label_smoothing": "a"}),
    "smoothing None": lambda x, t: ((x, t), {"label_smoothing": None}),
    "reduction": lambda x, t: ((x, t), {"reduction": "product"}),
    "reduction None": lambda x, t: ((x, t), {"reduction": None}),
    "ignore_index 1.5": lambda x, t: ((x, t), {"ignore_index": 1.5}),
    "ignore_index True": lambda x, t: ((x, t), {"ignore_index": True}),
    "ignore_index 2**70": lambda x, t: ((x, t), {"ignore_index": 2**70}),
    "input is a list": lambda x, t: (([1.0], t), {}),
    "target is a list": lambda x, t: ((x, [0, 1, 2, 0]), {}),
    "target is None": lambda x, t: ((x, None), {}),
    "weight is a list": lambda x, t: ((x, t, [1, 1, 1]), {}),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, grad):
    args, kwargs = BAD[case](torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    if grad and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
        args = (args[0].requires_grad_(), *args[1:])
    assert_refused_alike(ours.cross_entropy, F.cross_entropy, args, kwargs)


@pytest.mark.parametrize("smoothing", [-0.1, NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_smoothing_that_pytorch_accepts(smoothing, dtype):
    x, target = torch.randn(4, 3, dtype=dtype), torch.tensor([0, 1, 2, 0])
    for t in (target, torch.rand(4, 3, dtype=dtype)):
        with pytest.raises(RuntimeError, match="label_smoothing must be between"):
            ours.cross_entropy(x, t, label_smoothing=smoothing)


BAD_INTERNAL = {
    "reduction 3": ("cross_entropy", lambda x, t: (x, t, None, 3)),
    "reduction -1": ("cross_entropy_forward", lambda x, t: (x, t, None, -1, -100, 0.0)),
    "class": ("cross_entropy_forward", lambda x, t: (x, t + 3, None, 1, -100, 0.0)),
    "smoothing": ("cross_entropy_forward", lambda x, t: (x, t, None, 1, -100, NAN)),
    "weight": ("cross_entropy_forward", lambda x, t: (x, t, x[0, :2], 1, -100, 0.0)),
    "dtype": ("cross_entropy_forward", lambda x, t: (x.double(), t, None, 1, -100, 0.0)),
    "no classes": ("cross_entropy_forward", lambda x, t: (x[:, :0], t, None, 1, -100, 0.0)),
    "grad_y": ("cross_entropy_backward", lambda x, t: (torch.ones(3), x, t, -100)),
    "rank of grad_y": ("cross_entropy_backward", lambda x, t: (torch.ones(4, 1), x, t, -100)),
    "target": ("cross_entropy_backward", lambda x, t: (torch.ones(4), x, t[:3], -100)),
    "float target": ("cross_entropy_backward", lambda x, t: (torch.ones(4), x, t.float(), -100)),
    "rank of grad": ("cross_entropy_backward", lambda x, t: (x[0, 0], x[0, 0], t[0], -100)),
    "dtype of grad": ("cross_entropy_backward", lambda x, t: (x[0, 0], x.double(), t, -100)),
    "grad_y on meta": ("cross_entropy_backward", lambda x, t: (x[0, 0].to("meta"), x, t, -100)),
}


@pytest.mark.parametrize("case", BAD_INTERNAL)
def test_bad_input_of_internal_ops(case):
    name, bad = BAD_INTERNAL[case]
    args = bad(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(
        (RuntimeError, IndexError, NotImplementedError),
        match=r"must|Target|weight tensor|same device",
    ):
        getattr(torch.ops.dlkernels, name)(*args)
