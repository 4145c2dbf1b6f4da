"""dlkernels.nn on PyTorch's own samples of its modules, ModuleInfo."""

import copy

import pytest
import torch
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_leaves, tree_map_only

from dlkernels import nn as ours
from support.common import calls, compare
from support.samples import assert_same, outcome

OPS = {
    "Linear": "linear",
    "ReLU": "relu",
    "Conv2d": "conv2d",
    "MaxPool2d": "max_pool2d",
    "CrossEntropyLoss": "cross_entropy",
}
INFO = {i.module_cls.__name__: i for i in module_db if i.module_cls.__module__[:8] == "torch.nn"}
names = pytest.mark.parametrize("name", OPS)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def samples_of(name, dtype=torch.float32, training=True, requires_grad=True):
    """(constructor's args, its kwargs, forward's args, its kwargs, PyTorch's reference or None)"""
    torch.manual_seed(0)
    found = INFO[name].module_inputs_func(INFO[name], "cpu", dtype, requires_grad, training)
    return [
        (
            sample.constructor_input.args,
            sample.constructor_input.kwargs,
            sample.forward_input.args,
            sample.forward_input.kwargs,
            sample.reference_fn,
        )
        for sample in found
    ]


def make(library, name, args, kwargs, dtype=None, training=True):
    torch.manual_seed(1)
    return getattr(library, name)(*args, **kwargs).to(dtype=dtype).train(training)


def seen(module, args, kwargs):
    """All that can be seen of a module and of a call: values, gradients, state, text."""
    y = module(*args, **kwargs)
    first = y[0] if isinstance(y, tuple) else y
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    grads = ()
    if leaves and first.requires_grad:
        weights = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view(first.shape)
        grads = torch.autograd.grad(first, leaves, weights)
    return y, grads, dict(module.state_dict()), repr(module), module.training


def assert_same_modules(modules, args, kwargs):
    assert_same(*(outcome(seen, module, args, kwargs) for module in modules))


def compare_with_float64(modules, args, kwargs):
    names, parameters = zip(*modules[0].named_parameters())

    def called(module):
        def call(*tensors, **kwargs):
            state = dict(zip(names, tensors[len(args) :]))
            return torch.func.functional_call(module, state, tensors[: len(args)], kwargs)

        return call

    compare(*map(called, modules), (*args, *parameters), kwargs)


def both(name, args, kwargs, **options):
    return [make(library, name, args, kwargs, **options) for library in (ours, torch.nn)]


@names
@training
@dtypes
def test_samples(name, training, dtype):
    for ctor_args, ctor_kwargs, args, kwargs, reference in samples_of(name, dtype, training):
        modules = both(name, ctor_args, ctor_kwargs, dtype=dtype, training=training)
        if dtype is torch.bfloat16 and OPS[name] in ("linear", "conv2d"):
            compare_with_float64(modules, args, kwargs)  # PyTorch's rounds more than once
            continue
        assert_same_modules(modules, args, kwargs)
        with torch.no_grad():
            assert_same_modules(modules, args, kwargs)
            if reference is not None and dtype is not torch.bfloat16:  # where it rounds too much
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
                got, expected = modules[0](*args, **kwargs), reference(modules[0], *args, **kwargs)
                torch.testing.assert_close(got, expected, check_dtype=False, equal_nan=True)


@names
def test_samples_run_on_our_kernels(name):
    for ctor_args, ctor_kwargs, args, kwargs, _ in samples_of(name, requires_grad=False):
        with calls([OPS[name]]):
            make(ours, name, ctor_args, ctor_kwargs)(*args, **kwargs)


VARIANTS = {
    "noncontiguous": lambda t: noncontiguous_like(t) if t.numel() > 1 else t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "wrong dtype": lambda t: t.double(),
    "wrong rank": lambda t: t[None, None],
    "a feature too many": lambda t: torch.cat([t, t], 1 if t.dim() > 1 else 0) if t.dim() else t,
    "empty": lambda t: t[:0] if t.dim() else t,
    "meta": lambda t: t.to("meta"),
    "none": lambda t: None,
}


@names
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(name, variant):
    """Inputs laid out otherwise, and inputs that do not fit."""
    on_meta = variant == "meta"
    for ctor_args, ctor_kwargs, *call, _ in samples_of(name, requires_grad=False):
        modules = both(name, ctor_args, ctor_kwargs)
        if on_meta:
            modules = [module.to("meta") for module in modules]
        if variant == "channels_last":
            modules = [module.to(memory_format=torch.channels_last) for module in modules]
        args, kwargs = tree_map_only(torch.Tensor, VARIANTS[variant], tuple(call))
        if on_meta:  # nothing to compare but the shapes
            results = [module(*args, **kwargs) for module in modules]
            shapes = [[(y.shape, y.stride(), y.dtype) for y in tree_leaves(ys)] for ys in results]
            assert_same(*shapes)
        else:
            assert_same_modules(modules, args, kwargs)


@names
def test_factory_arguments(name):
    for ctor_args, ctor_kwargs, *_ in samples_of(name):
        for factory in (
            {"dtype": torch.float64},
            {"device": "meta"},
            {"device": torch.device("cpu"), "dtype": torch.bfloat16},
            {"device": "nonsense"},
            {"dtype": torch.int32},
        ):
            results = []
            for library in (ours, torch.nn):
                module = outcome(make, library, name, ctor_args, {**ctor_kwargs, **factory})
                if not isinstance(module, Exception):
                    module = [(p.device, p.dtype, p.shape) for p in module.parameters()]
                results.append(module)
            assert_same(*results)


@names
def test_frozen_parameters_and_hooks(name):
    """Some parameters without a gradient; hooks on module and tensors, in the same order."""
    for ctor_args, ctor_kwargs, args, kwargs, _ in samples_of(name):
        for frozen in ((), ("weight",), ("bias",), ("weight", "bias")):
            results = []
            for module in both(name, ctor_args, ctor_kwargs):
                log = []
                for key, parameter in module.named_parameters():
                    parameter.requires_grad_(key not in frozen)
                module.register_forward_pre_hook(lambda m, a, log=log: log.append(("pre", len(a))))
                module.register_forward_hook(lambda m, a, y, log=log: log.append(("forward", y)))
                module.register_full_backward_hook(
                    lambda m, gx, gy, log=log: log.append(("backward", gx, gy))
                )
                results.append([outcome(seen, module, args, kwargs), log])
            assert_same(*results)


@names
def test_state_copies_and_moves(name):
    """A state dict loads into the other's class, strictly; copies and moves keep the class."""
    for ctor_args, ctor_kwargs, args, kwargs, _ in samples_of(name):
        mine, theirs = both(name, ctor_args, ctor_kwargs)
        for source, target in ((mine, theirs), (theirs, mine)):
            with torch.no_grad():
                for p in source.parameters():
                    p.neg_()
            missing, unexpected = target.load_state_dict(copy.deepcopy(source.state_dict()))
            assert not missing and not unexpected
            assert_same_modules((mine, theirs), args, kwargs)
        moved = [m.to("meta").to_empty(device="cpu").double() for m in (mine, theirs)]
        assert type(moved[0]) is getattr(ours, name)
        for module in moved:
            module.load_state_dict(make(torch.nn, name, ctor_args, ctor_kwargs).state_dict())
        assert_same_modules(moved, *tree_map_only(torch.Tensor, to_double, (args, kwargs)))


def to_double(t):
    return t.detach().double() if t.is_floating_point() else t


def error_samples(name):
    info = INFO[name]
    if info.module_error_inputs_func:
        for error in info.module_error_inputs_func(info, "cpu", torch.float32, True, True):
            sample = error.module_error_input
            ctor, forward = sample.constructor_input, sample.forward_input
            yield ctor.args, ctor.kwargs, forward.args, forward.kwargs, error


@pytest.mark.parametrize("name", [name for name in OPS if INFO[name].module_error_inputs_func])
def test_error_samples(name):
    """PyTorch's class of exception, and text that says what PyTorch's says."""
    for ctor_args, ctor_kwargs, args, kwargs, error in error_samples(name):
        with pytest.raises(error.error_type, match=error.error_regex):
            make(ours, name, ctor_args, ctor_kwargs)(*args, **kwargs)


X = torch.ones(2, 4, 6, 6)
BAD = [
    ("Linear", (-1, 3), {}, X),
    ("Linear", ("4", 3), {}, X),
    ("Linear", (6,), {}, X),
    ("Linear", (6, 3), {"unknown": 1}, X),
    ("Linear", (6, 0), {}, X),
    ("Linear", (6, 3), {}, [X]),
    ("ReLU", ("yes",), {}, X),
    ("ReLU", (), {}, X.bool()),
    ("ReLU", (True,), {}, X.clone().requires_grad_()),
    ("Conv2d", (4, 6, 3), {"groups": 3}, X),
    ("Conv2d", (4, 6, 3), {"groups": 0}, X),
    ("Conv2d", (4, 6, 3), {"groups": -2}, X),
    ("Conv2d", (4, 6, 3), {"padding": "full"}, X),
    ("Conv2d", (4, 6, 3), {"padding": "same", "stride": 2}, X),
    ("Conv2d", (4, 6, 3), {"padding_mode": "nothing"}, X),
    ("Conv2d", (4, 6, 3), {"padding": 7, "padding_mode": "reflect"}, X),
    ("Conv2d", (4, 6, 3), {"padding": -1}, X),
    ("Conv2d", (4, 6, 3), {"stride": 0}, X),
    ("Conv2d", (4, 6, 3), {"dilation": 0}, X),
    ("Conv2d", (4, 6, 3), {"dilation": 9}, X),
    ("Conv2d", (4, 6, 0), {}, X),
    ("Conv2d", (4, 6, (3, 3, 3)), {}, X),
    ("Conv2d", (4, 6, 3), {"stride": (1, 1, 1)}, X),
    ("Conv2d", (4, 6, 3), {"stride": 1.5}, X),
    ("Conv2d", (4, 6, 9), {}, X),
    ("Conv2d", (4, 0, 3), {}, X),
    ("Conv2d", (4.0, 6, 3), {}, X),
    ("MaxPool2d", (), {}, X),
    ("MaxPool2d", (0,), {}, X),
    ("MaxPool2d", (-1,), {}, X),
    ("MaxPool2d", (9,), {}, X),
    ("MaxPool2d", ("2",), {}, X),
    ("MaxPool2d", (2.0,), {}, X),
    ("MaxPool2d", (2, 0), {}, X),
    ("MaxPool2d", (2, None, 2), {}, X),
    ("MaxPool2d", (2, None, 0, 0), {}, X),
    ("MaxPool2d", ((2, 2, 2),), {}, X),
    ("MaxPool2d", (2,), {"ceil_mode": "yes"}, X),
    ("MaxPool2d", (2,), {"return_indices": 1}, X),
    ("MaxPool2d", (2,), {}, X.to(torch.complex64)),
    ("CrossEntropyLoss", (), {"reduction": "median"}, X),
    ("CrossEntropyLoss", (), {"label_smoothing": 2.0}, X),
    ("CrossEntropyLoss", (), {"label_smoothing": "0.1"}, X),
    ("CrossEntropyLoss", (), {"ignore_index": 1.5}, X),
    ("CrossEntropyLoss", (), {"ignore_index": None}, X),
    ("CrossEntropyLoss", ([1.0] * 4,), {}, X),
    ("CrossEntropyLoss", (torch.ones(5),), {}, X),
    ("CrossEntropyLoss", (), {"size_average": False}, X),
]


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "x"),
    BAD,
    ids=[f"{name} {args} {kwargs}" for name, args, kwargs, _ in BAD],
)
def test_bad_arguments(name, args, kwargs, x):
    """The same exception, in the constructor or in the call; or none."""
    call = (x, torch.zeros(2, 6, 6, dtype=torch.int64)) if name == "CrossEntropyLoss" else (x,)

    def made_and_called(library):
        return seen(make(library, name, args, kwargs), call, {})

    assert_same(*(outcome(made_and_called, library) for library in (ours, torch.nn)))
