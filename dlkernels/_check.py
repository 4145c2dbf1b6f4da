"""Every kernel once against PyTorch: ``dlkernels info --check``."""

import torch
import torch.nn.functional as F

from . import _state, functional, optim


def _linear_relu(x, w, b):
    return F.relu(F.linear(x, w, b))


def _conv2d_relu(x, w, b):
    return F.relu(F.conv2d(x, w, b, padding=1))


def _classes(x):
    return torch.arange(len(x)) % x.shape[1]


# op: (our function, PyTorch's, shapes of their arguments)
CASES = {
    "linear": (functional.linear, F.linear, [(37, 70), (45, 70), (45,)]),
    "linear_relu": (functional.linear_relu, _linear_relu, [(37, 70), (45, 70), (45,)]),
    "mlp": (
        lambda x, v, a, w, b: functional.mlp(x, [v, w], [a, b]),
        lambda x, v, a, w, b: F.linear(_linear_relu(x, v, a), w, b),
        [(37, 70), (45, 70), (45,), (10, 45), (10,)],
    ),
    "relu": (functional.relu, F.relu, [(37, 70)]),
    "leaky_relu": (functional.leaky_relu, F.leaky_relu, [(37, 70)]),
    "conv2d": (
        lambda x, w, b: functional.conv2d(x, w, b, padding=1),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        [(3, 16, 14, 13), (24, 16, 3, 3), (24,)],
    ),
    "conv2d_relu": (
        lambda x, w, b: functional.conv2d_relu(x, w, b, padding=1),
        _conv2d_relu,
        [(3, 3, 14, 13), (24, 3, 3, 3), (24,)],
    ),
    "conv2d_relu_max_pool2d": (
        lambda x, w, b: functional.conv2d_relu_max_pool2d(x, w, b, padding=1),
        lambda x, w, b: F.max_pool2d(_conv2d_relu(x, w, b), 2),
        [(3, 3, 14, 13), (24, 3, 3, 3), (24,)],
    ),
    "max_pool2d": (
        lambda x: functional.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        [(3, 5, 14, 13)],
    ),
    "cross_entropy": (
        lambda x: functional.cross_entropy(x, _classes(x)),
        lambda x: F.cross_entropy(x, _classes(x)),
        [(37, 70)],
    ),
    **{
        f"{name.lower()}_": (
            lambda *params, name=name: _steps(getattr(optim, name), params),
            lambda *params, name=name: _steps(getattr(torch.optim, name), params),
            [(37, 70), (5,), (1000,)],
        )
        for name in ("SGD", "Adam", "Adagrad", "Adadelta", "RMSprop")
    },
}


def _steps(make, values):
    """Three steps on copies of `values`, whose gradients they are too."""
    params = [value.detach().clone().requires_grad_() for value in values]
    optimizer = make(params, lr=0.1)
    for _ in range(3):
        for p, value in zip(params, values):
            p.grad = value.detach().clone()
        optimizer.step()
    return torch.cat([(p * value).flatten() for p, value in zip(params, values)])


def check():
    """Runs every kernel once, forward and backward, and compares it with PyTorch's op in float64.

    Returns:
        {op: "ok", or what is wrong}. An error may be 1e-5 of the greatest value: some ten times
        what rounding makes of it, and far less than a wrong kernel would.
    """
    found = {}
    for op, (function, reference, shapes) in CASES.items():
        random = torch.Generator().manual_seed(0)  # the caller's numbers stay what they are
        args = [torch.randn(shape, generator=random) for shape in shapes]
        try:
            with _state.set_fallback("error"):
                got = _results(function, args)
            exact = _results(reference, [x.double() for x in args])
            errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, exact)]
            error = float(torch.stack(errors).max())  # NaN where one of them is
        except Exception as raised:  # whatever it is belongs into the report
            found[op] = f"raised {type(raised).__name__}: {raised}"
        else:
            found[op] = "ok" if error <= 1e-5 else f"differs by {error:.1e} of the greatest value"
    return found


def _results(f, args):
    """f's value and its gradients."""
    args = [x.requires_grad_() for x in args]
    y = f(*args)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), args)]
