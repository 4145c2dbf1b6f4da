"""What is timed: a case is one op on one shape, a provider is who computes it.

A provider is a function build(case, inputs) -> (run, arrays): run() is the step to time, and
arrays(what run() returned) are NumPy arrays in PyTorch's layout, the output before the gradients.
`inputs` are NumPy arrays by name; without "grad_y" the step is the forward pass alone.
"""

import gc
from dataclasses import dataclass
from importlib import util
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from dlkernels import functional

from .timing import turn

PEERS = ("numpy", "jax", "tensorflow")  # those of the providers that may be missing


def missing():
    return [name for name in PEERS if util.find_spec(name) is None]


# Who can end the process has one of its own.
SEPARATE = ("jax", "tensorflow")
# So can torch.compile, but on a heap of its own it would be no like of PyTorch's: it is tried in
# another process, and then timed in this one.
TRIED = ("compile",)


def is_one_of(kinds, provider):
    return provider.split()[0] in kinds


def time_case(case, inputs, provider):
    """The job of a provider's worker: yields its first results, then always the seconds a call."""
    gc.enable()
    step, arrays = case.providers[provider](case, inputs)
    results = [np.array(a) for a in arrays(step())]  # copies, as a step may write to its last ones
    take_turn = turn(step)
    yield results
    del results
    gc.collect()
    gc.disable()  # as in timing.interleave()
    while True:
        yield take_turn()


@dataclass(frozen=True)
class Case:
    """One op on one shape. Each op's subclass has the sizes as fields, and as methods its formula
    for each kind of provider; those of `python` and `numpy` write their gradients out."""

    op: ClassVar[str]
    modes: ClassVar[tuple] = ("forward", "forward+backward")
    providers: ClassVar[dict]  # {name: build}; set below

    @property
    def wanted(self):
        """The inputs whose gradients are asked for."""
        raise NotImplementedError

    def inputs(self, rng):
        """All inputs and, as "grad_y", the gradient of the output."""
        raise NotImplementedError

    def flops(self, mode):
        """Multiplications and additions, where they and not memory may be the limit."""
        return 0

    def bytes(self, mode):
        """What must be read and written at least once."""
        raise NotImplementedError

    def arrays(self, mode):
        """The inputs that a step in this mode takes: the same values for every provider."""
        inputs = self.inputs(np.random.default_rng(0))
        if mode == "forward":
            del inputs["grad_y"]
        return {
            name: a.astype(np.float32 if a.dtype == float else a.dtype)
            for name, a in inputs.items()
        }

    def footprint(self, mode):
        """How many bytes of memory that touches: fewer, where some are both read and written."""
        return self.bytes(mode)

    def exact(self, inputs):
        """PyTorch in float64, which every provider's error is measured against."""
        return torch_provider(F, dtype=torch.float64)(self, inputs)


def away_from_kink(case, inputs):
    """The inputs with no incoming gradient where rounding may decide on which side of 0 a ReLU's
    input falls: that would count as a huge error of the gradients."""
    if "grad_y" in inputs:
        linear = SimpleNamespace(linear=F.linear, conv2d=F.conv2d, relu=lambda x: x)
        x = {name: torch.from_numpy(a).double() for name, a in inputs.items() if name != "grad_y"}
        inputs["grad_y"][case.torch(linear, **x).abs().numpy() < 1e-4] = 0
    return inputs


def python(case, inputs):
    values = {name: a.tolist() for name, a in inputs.items()}
    return lambda: case.python(**values), lambda results: [np.array(r) for r in results]


def numpy(case, inputs):
    return lambda: case.numpy(**inputs), lambda results: results


def torch_provider(
    functional, memory_format=None, compile=False, dtype=torch.float32, device="cpu"
):
    """PyTorch's autograd over case.torch, with `functional` as the module of the ops."""

    def tensor(a):
        t = torch.from_numpy(a).clone().to(device)
        if t.dim() == 4 and memory_format:
            t = t.to(memory_format=memory_format)
        return t.to(dtype) if t.is_floating_point() else t

    def build(case, inputs):
        tensors = {name: tensor(a) for name, a in inputs.items()}
        grad_y = tensors.pop("grad_y", None)

        def forward():
            return case.torch(functional, **tensors)

        if compile:
            torch.compiler.reset()  # else the eighth shape of an op would silently run eagerly
            f = torch.compile(lambda values: case.torch(functional, **values), dynamic=False)

            def forward():
                return f(tensors)

        def arrays(results):
            wide = torch.promote_types(dtype, torch.float32)  # NumPy has no bfloat16
            return [r.detach().to("cpu", wide).numpy() for r in results]

        if grad_y is None:
            return lambda: [forward()], arrays

        wanted = [tensors[name].requires_grad_() for name in case.wanted]

        def run():
            y = forward()
            return [y, *torch.autograd.grad(y, wanted, grad_y)]

        return run, arrays

    return build


# JAX and TensorFlow keep images as NHWC and weights as (K, N) or (KH, KW, C, K).


def native(name, a):
    axes = {("weight", 2): (1, 0), ("weight", 4): (2, 3, 1, 0)}
    return a.transpose(axes.get((name, a.ndim), (0, 2, 3, 1) if a.ndim == 4 else range(a.ndim)))


def from_native(case, results):
    axes = {("weight", 2): (1, 0), ("weight", 4): (3, 2, 0, 1)}
    results = {name: np.asarray(r) for name, r in zip(("y", *case.wanted), results)}
    return [
        r.transpose(axes.get((name, r.ndim), (0, 3, 1, 2) if r.ndim == 4 else range(r.ndim)))
        for name, r in results.items()
    ]


def jax(case, inputs):
    import jax

    values = {name: jax.numpy.array(native(name, a)) for name, a in inputs.items()}
    grad_y = values.pop("grad_y", None)

    @jax.jit
    def step(values, grad_y):
        if grad_y is None:
            return [case.jax(**values)]
        wanted = {name: values[name] for name in case.wanted}
        y, pull_back = jax.vjp(lambda wanted: case.jax(**values | wanted), wanted)
        (grads,) = pull_back(grad_y)
        return [y, *(grads[name] for name in case.wanted)]

    return (
        lambda: jax.block_until_ready(step(values, grad_y)),
        lambda results: from_native(case, results),
    )


def tensorflow(case, inputs):
    import tensorflow as tf

    values = {name: tf.constant(native(name, a)) for name, a in inputs.items()}
    grad_y = values.pop("grad_y", None)

    @tf.function
    def step(values, grad_y):  # as arguments: what it captures, TensorFlow folds into constants
        if grad_y is None:
            return [case.tensorflow(**values)]
        wanted = [values[name] for name in case.wanted]
        with tf.GradientTape() as tape:
            tape.watch(wanted)
            y = case.tensorflow(**values)
        return [y, *tape.gradient(y, wanted, grad_y)]

    return lambda: step(values, grad_y), lambda results: from_native(case, results)


Case.providers = {
    "python": python,
    "numpy": numpy,
    "torch": torch_provider(F),
    "compile": torch_provider(F, compile=True),
    "jax": jax,
    "tensorflow": tensorflow,
    "dlkernels": torch_provider(functional),
}
BOTH_LAYOUTS = Case.providers | {
    "torch channels_last": torch_provider(F, torch.channels_last),
    "compile channels_last": torch_provider(F, torch.channels_last, compile=True),
    "dlkernels channels_last": torch_provider(functional, torch.channels_last),
}
