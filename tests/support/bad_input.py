"""Bad arguments, one after the other, for test_bad_input.py: `python bad_input.py GROUP` calls them
all in one process and prints each case before it calls it, so that a crash shows where it was."""

import resource
import signal
import sys

import torch
import torch.nn.functional as F

import dlkernels
import dlkernels.functional as ours

NAN, INF = float("nan"), float("inf")
WILD = (2**31, 2**62, 2**63 - 1, -(2**63))  # PyTorch's own arithmetic overflows
NUMBERS = (0, -1, *WILD, 2**63, 2**64, 1.5, NAN, INF, -INF, True, None, "a", [], (), {}, 1j)
LISTS = (
    [1, 1, 1],
    (2,),
    [0, 1],
    [-1, 1],
    [2**62, 1],
    [1.5, 1],
    ["a", 1],
    [None],
    [[1, 1]],
    range(2),
)


def tensors(x):
    """What may stand in x's place."""
    yield from (None, "a", 1, 1.5, [], [x], x.tolist(), object())
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        yield x.to(dtype)
    yield from (x.to("meta"), x[None], x.flatten(), x.reshape(-1)[0])
    if x.dim():
        yield from (x[:0], x[..., :0], torch.cat([x, x]), torch.cat([x, x], -1))
        yield from (x[:1].expand(2**40, *x.shape[1:]), x[..., :1].expand(*x.shape[:-1], 2**40))
        yield x.to_sparse()
    if x.dtype is torch.float32:
        yield torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
        yield torch.nested.nested_tensor([x])


def bad_values(good):
    if isinstance(good, torch.Tensor):
        yield from tensors(good)
    elif isinstance(good, list) and good and isinstance(good[0], torch.Tensor):
        yield from ([], None, good[0], good[:-1], [*good, good[0]], [None] * len(good), "a", 1)
        for i, x in enumerate(good):
            for value in tensors(x):
                yield [*good[:i], value, *good[i + 1 :]]
    else:
        yield from NUMBERS
        yield from LISTS
        if isinstance(good, list | tuple):
            for value in NUMBERS:
                yield [value, *good[1:]]
                yield [*good[:-1], value]


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{value.layout} {value.dtype} on {value.device}"[6:] + (
            "" if value.is_nested else f" {[*value.shape]}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"[:150]
    return repr(value)[:80]


def contains(value, what):
    values = value if isinstance(value, list | tuple) else (value,)
    return any(what(v) for v in values)


def is_unsafe(value):
    """Whether PyTorch's own is not to be asked: it reads or writes where it must not, or hangs."""
    return contains(value, lambda v: isinstance(v, int) and v in WILD) or contains(
        value,
        lambda v: (
            isinstance(v, torch.Tensor)
            and (v.is_meta or v.is_quantized or v.is_nested or v.numel() > 2**30)
        ),
    )


def outcome(f, args):
    try:
        f(**args)
    except Exception as error:
        return error
    return None


def check(name, f, torchs, good):
    """f with every argument replaced; where PyTorch raises, so must f, and the same class."""
    wrong = 0
    for key in good:
        for value in bad_values(good[key]):
            print(f"{name}: {key} = {describe(value)}", flush=True)
            args = {**good, key: value}
            got = outcome(f, args)
            if not torchs or is_unsafe(value):
                continue
            expected = outcome(torchs, args)
            is_large = isinstance(expected, OverflowError)  # as a float it may be good
            if expected is not None and type(got) is not type(expected) and not is_large:
                wrong += 1
                print(f"WRONG {got!r}\n  expected {expected!r}", flush=True)
    assert outcome(f, good) is None, f"{name} afterwards: {outcome(f, good)!r}"
    return wrong


# ---- the functions, modules and optimizers ------------------------------------------------------


def t(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


def functions():
    classes = torch.tensor([0, 2, 1, 0])
    linear = {"input": t(4, 5), "weight": t(3, 5), "bias": t(3)}
    conv = {"input": t(2, 4, 6, 6), "weight": t(4, 2, 3, 3), "bias": t(4)}
    conv |= {"stride": 1, "padding": 1, "dilation": (1, 1), "groups": 2}
    pool = {"input": t(2, 3, 8, 8), "kernel_size": 2, "stride": (2, 2), "padding": 1}
    pool |= {"dilation": 1, "ceil_mode": False, "return_indices": False}
    entropy = {"input": t(4, 3), "target": classes, "weight": torch.rand(3)}
    entropy |= {"size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean"}
    entropy |= {"label_smoothing": 0.1}
    pooled = {f"pool_{k}": pool[k] for k in ("kernel_size", "stride", "padding", "dilation")}
    mlp = {"input": t(4, 5), "weights": [t(3, 5), t(2, 3)], "biases": [t(3), t(2)]}
    adam = {k: [torch.rand(3, 2)] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    adam |= {"state_steps": [torch.ones(())], "lr": 0.1, "beta1": 0.9, "beta2": 0.9}
    adam |= {"weight_decay": 0.1, "eps": 1e-8, "maximize": False, "decoupled_weight_decay": False}
    adam |= {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
    yield "linear", ours.linear, F.linear, linear
    yield "linear_relu", ours.linear_relu, lambda **k: F.relu(F.linear(**k)), linear
    yield "mlp", ours.mlp, None, mlp
    yield "relu", ours.relu, F.relu, {"input": t(4, 5), "inplace": False}
    leaky = {"input": t(4, 5), "negative_slope": 0.1, "inplace": False}
    yield "leaky_relu", ours.leaky_relu, F.leaky_relu, leaky
    yield "conv2d", ours.conv2d, F.conv2d, conv
    yield "conv2d_relu", ours.conv2d_relu, lambda **k: F.relu(F.conv2d(**k)), conv
    yield "max_pool2d", ours.max_pool2d, F.max_pool2d, pool
    yield "cross_entropy", ours.cross_entropy, F.cross_entropy, entropy
    full = {**conv, **pooled, "ceil_mode": False}
    yield "conv2d_relu_max_pool2d", ours.conv2d_relu_max_pool2d, None, full
    plain = {**conv, "pool_kernel_size": 2}
    yield "conv2d_relu_max_pool2d 2x2", ours.conv2d_relu_max_pool2d, None, plain
    yield "adam_", ours.adam_, None, adam
    yield "set_precision", dlkernels.set_precision, None, {"to": "fast"}
    yield "set_fallback", dlkernels.set_fallback, None, {"to": "torch"}


def modules():
    linear = {"in_features": 5, "out_features": 3, "bias": True, "device": None, "dtype": None}
    conv = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": 1, "padding": 1}
    conv |= {"dilation": 1, "groups": 2, "bias": True, "padding_mode": "zeros"}
    pool = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "return_indices": False}
    pool |= {"ceil_mode": False}
    entropy = {"weight": torch.rand(3), "ignore_index": -100, "reduction": "mean"}
    entropy |= {"label_smoothing": 0.0}
    pooled = {f"pool_{k}": pool[k] for k in ("kernel_size", "stride", "padding", "dilation")}
    for name, like, args, x in [
        ("Linear", "Linear", linear, t(4, 5)),
        ("LinearReLU", "Linear", linear, t(4, 5)),
        ("Conv2d", "Conv2d", conv, t(2, 4, 6, 6)),
        ("Conv2dReLU", "Conv2d", conv, t(2, 4, 6, 6)),
        ("Conv2dReLUMaxPool2d", None, {**conv, **pooled, "ceil_mode": False}, t(2, 4, 6, 6)),
        ("MaxPool2d", "MaxPool2d", pool, t(2, 3, 8, 8)),
        ("ReLU", "ReLU", {"inplace": False}, t(4, 5)),
        ("MLP", None, {"sizes": [5, 4, 3], "bias": True}, t(4, 5)),
        ("CrossEntropyLoss", "CrossEntropyLoss", entropy, t(4, 3)),
    ]:
        extra = (torch.tensor([0, 2, 1, 0]),) if name == "CrossEntropyLoss" else ()

        def construct_and_call(cls, x=x, extra=extra):
            return lambda **given: cls(**given)(x, *extra)

        def call(cls, args=args, extra=extra):
            return lambda input, args=args: cls(**args)(input, *extra)

        cls, torchs = getattr(dlkernels.nn, name), like and getattr(torch.nn, like)
        yield f"nn.{name}", construct_and_call(cls), torchs and construct_and_call(torchs), args
        yield f"nn.{name}()", call(cls), torchs and call(torchs), {"input": x}


def optimizers():
    args = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1, "maximize": False, "foreach": None}
    args |= {"differentiable": False}

    def step(cls):
        def construct_and_step(params, **args):
            optimizer = cls(params, **args)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()

        return construct_and_step

    adam = args | {"betas": (0.9, 0.99), "amsgrad": False, "capturable": False, "fused": None}
    capturable, momentum = {"capturable": False}, {"momentum": 0.9}
    for name, options in {
        "Adam": adam,
        "AdamW": adam,
        "SGD": {**args, **momentum, "dampening": 0, "nesterov": True, "fused": None},
        "Adagrad": {**args, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "fused": None},
        "Adadelta": {**args, **capturable, "rho": 0.9},
        "RMSprop": {**args, **capturable, **momentum, "alpha": 0.9, "centered": True},
    }.items():
        pair = (step(getattr(module, name)) for module in (dlkernels.optim, torch.optim))
        options = {k: v for k, v in options.items() if (name, k) != ("SGD", "eps")}
        yield name, *pair, {"params": [t(3, 2), t(2)], **options}


def operators():
    """Every op of the library, the internal ones too, called by its schema."""
    ops, w8 = torch.ops.dlkernels, [2, 2, 2, 2, 0, 0, 1, 1]
    x, w, b, g = (torch.randn(s) for s in ((4, 5), (3, 5), (3,), (4, 3)))
    image, kernel, gi = (torch.randn(s) for s in ((2, 4, 6, 6), (4, 2, 3, 3), (2, 4, 6, 6)))
    conv = [[1, 1], [1, 1, 1, 1], [1, 1], 2]
    y, argmax = ops.conv2d_relu_max_pool2d_forward(image, kernel, None, *conv)
    pooled, byte = ops.max_pool2d_forward(image, w8, False)
    classes = torch.tensor([0, 2, 1, 0])
    lists, step = [[torch.rand(3, 2)] for _ in range(4)], [torch.ones(())]
    hidden = [torch.rand(4, 3)]
    good = {
        "linear": [x, w, b],
        "linear_relu": [x, w, b],
        "linear_backward": [g, x, w, g, [True] * 3],
        "mlp": [x, [w, torch.randn(2, 3)], [b, b[:2]]],
        "mlp_forward": [x, [w, torch.randn(2, 3)], [b, b[:2]]],
        "mlp_backward": [torch.rand(4, 2), x, [w, torch.randn(2, 3)], hidden, True, True],
        "relu": [x],
        "relu_backward": [x, x],
        "leaky_relu": [x, 0.1],
        "leaky_relu_backward": [x, x, 0.1],
        "conv2d": [image, kernel, kernel[:, 0, 0, 0], *conv],
        "conv2d_relu": [image, kernel, None, *conv],
        "conv2d_backward": [gi, image, kernel, gi, *conv, [True] * 3],
        "conv2d_relu_max_pool2d": [image, kernel, None, *conv],
        "conv2d_relu_max_pool2d_forward": [image, kernel, None, *conv],
        "conv2d_relu_max_pool2d_backward": [y, argmax, image, kernel, *conv, [True] * 3],
        "max_pool2d": [image, [2, 2], [2, 2], [0, 0], [1, 1], False],
        "max_pool2d_with_indices": [image, [2, 2], [2, 2], [0, 0], [1, 1], False],
        "max_pool2d_forward": [image, w8, False],
        "max_pool2d_indices": [byte, [6, 6], w8, False],
        "max_pool2d_backward": [pooled, byte, [6, 6], w8, False],
        "cross_entropy": [g, classes, b, 1, -100, 0.1],
        "cross_entropy_forward": [g, classes, b, 1, -100, 0.1],
        "cross_entropy_backward": [torch.ones(()), g, classes, -100],
        "adam_": [*lists, step, 0.1, 0.9, 0.9, 0.1, 1e-8, False, False, None, None, None],
        "sgd_": [*lists[:3], 0.1, 0.9, 0.1, 0.1, True, False, False, None, None],
        "adagrad_": [*lists[:3], step, 0.1, 0.1, 0.1, 1e-8, False, None, None],
        "adadelta_": [*lists, step, 0.1, 0.9, 1e-8, 0.1, False, None, None],
        "rmsprop_": [*lists, lists[0], step, 0.1, 0.9, 1e-8, 0.1, 0.9, True, False, None, None],
    }
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "dlkernels::" in n}
    assert {n.split(".")[0] for n in names} == set(good), "an op without its line here"
    for name, values in good.items():
        op = getattr(ops, name).default
        keys = [argument.name for argument in op._schema.arguments]
        yield name, op, None, dict(zip(keys, values, strict=True))


GROUPS = {f.__name__: f for f in (functions, modules, optimizers, operators)}


def main():
    torch.manual_seed(0)
    torch.relu(torch.randn(10**6))  # the threads, before memory is short
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))  # terabytes are refused
    signal.alarm(100)
    wrong = sum(check(*case) for case in GROUPS[sys.argv[1]]())
    print(f"done: {wrong} wrong")
    sys.exit(min(wrong, 1))


if __name__ == "__main__":
    main()
