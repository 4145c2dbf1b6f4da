"""The ops and whole steps on a GPU: ``python -m dlkernels.benchmarks.gpu FILE.json``.

Times are those of CUDA events around a step, with the L2 cache flushed before it. Providers take
turns; a ratio is the median of the rounds' ratios. "graphed" steps are replays of a CUDA graph, for
PyTorch too. Every table has a precision: PyTorch's own float32 convolutions are TF32 by default.
"""

import datetime
import json
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import dlkernels
from dlkernels import functional

from . import bench_optim, models, report
from .bench_conv2d_relu import Conv2dReLU
from .bench_conv2d_relu_max_pool2d import Conv2dReLUMaxPool2d
from .bench_cross_entropy import CrossEntropy
from .bench_linear_relu import LinearReLU
from .bench_max_pool2d import MaxPool2d
from .bench_optim import Adam
from .case import torch_provider

ROUNDS, WARM_UP = 30, 5
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# (case, its precisions)
CASES = [
    *((LinearReLU(n, n, n), ("float32", "tf32", "bfloat16")) for n in (512, 1024, 4096)),
    (LinearReLU(256, 784, 256), ("float32", "bfloat16")),
    (Conv2dReLU(64, 64, 56, 64, 3), ("tf32", "bfloat16", "float32")),
    (Conv2dReLU(64, 256, 14, 256, 3), ("tf32", "bfloat16")),
    (Conv2dReLUMaxPool2d(256, 1, 28, 32, 3), ("tf32", "float32")),
    (MaxPool2d(256, 64, 56, 2, 2), ("float32", "bfloat16")),
    (CrossEntropy(4096, 1000), ("float32", "bfloat16")),
    (CrossEntropy(8192, 32000), ("float32",)),
    (Adam("1 M", ((1024, 1024),)), ("float32",)),
    (Adam("100 M", ((1024, 1024),) * 96), ("float32",)),
]


def captured(build):
    """The provider with its step as a CUDA graph."""

    def build_graph(case, inputs):
        run, arrays = build(case, inputs)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()

        def replay():
            graph.replay()
            return results

        return replay, arrays

    return build_graph


def providers(case, dtype):
    if isinstance(case, Adam):
        build = partial(bench_optim.torch_provider, device="cuda")
        return {
            "torch": build(torch.optim),
            "torch fused": build(torch.optim, fused=True),
            "torch fused graphed": captured(build(torch.optim, fused=True, capturable=True)),
            "dlkernels": build(dlkernels.optim),
            "dlkernels graphed": captured(build(dlkernels.optim, capturable=True)),
        }
    build = partial(torch_provider, dtype=dtype, device="cuda")
    layouts = {"": None}
    if any(a.ndim == 4 for a in case.arrays("forward").values()):
        layouts[" channels_last"] = torch.channels_last
    found = {}
    for name, layout in layouts.items():
        found |= {
            f"torch{name}": build(F, layout),
            f"torch{name} graphed": captured(build(F, layout)),
            f"compile{name}": build(F, layout, compile=True),
            f"dlkernels{name}": build(functional, layout),
            f"dlkernels{name} graphed": captured(build(functional, layout)),
        }
    return found


def time_turns(steps):
    """{name: [seconds a call in each round]}, all providers in each round once."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2 cache
    events = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(ROUNDS):
        for name in random.sample(list(steps), len(steps)):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            steps[name]()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()  # or what is enqueued grows without bounds
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def seconds(step):
    return float(np.median(time_turns({"": step})[""]))


def roofs():
    """Bytes/s of a copy (read and written) and FLOP/s of PyTorch's large product, by precision."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    flops = {}
    for precision, dtype in DTYPES.items():
        set_precision(precision)
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        flops[precision] = 2 * 8192**3 / seconds(lambda a=a: a @ a)
    return {"bytes": 8 * source.numel() / seconds(lambda: target.copy_(source)), "flops": flops}


def set_precision(precision):
    """For PyTorch and for us: whether float32 products may be rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def run(case, precision, roof):
    """A result as suite.run() gives it."""
    set_precision(precision)
    dtype, mode = DTYPES[precision], case.modes[-1]
    inputs = case.arrays(mode)
    exact = torch_provider(F, dtype=torch.float64, device="cuda")
    exact_run, exact_arrays = (case.exact if isinstance(case, Adam) else partial(exact, case))(
        inputs
    )
    exact = [np.array(a) for a in exact_arrays(exact_run())]
    steps, errors, failed = {}, {}, {}
    for name, build in providers(case, dtype).items():
        try:
            steps[name], arrays = build(case, inputs)
            results = arrays(steps[name]())
        except Exception as error:
            if name.startswith("dlkernels"):
                raise
            failed[name] = str(error).splitlines()[0]
            steps.pop(name, None)
            continue
        if name.endswith(" graphed"):  # its warm-up were steps of Adam
            errors[name] = errors[name.removesuffix(" graphed")]
            continue
        errors[name] = max(
            float(np.abs(r - e).max() / np.abs(e).max()) for r, e in zip(results, exact)
        )
    size = case.bytes(mode) * dtype.itemsize // 4
    times = time_turns(steps)
    return {
        "op": case.op,
        "case": f"{case}, {precision}",
        "mode": mode,
        "small": False,
        "flops": case.flops(mode),
        "bytes": size,
        "roofs": {
            "compute": case.flops(mode) / roof["flops"][precision],
            "memory": size / roof["bytes"],
        },
        "busy_cores": 0.0,
        "providers": {name: {"seconds": times[name], "error": errors[name]} for name in steps},
        "failed": failed,
    }


# {provider: models.torch_step's options}
STEPS = {
    "torch": {},
    "torch fused": {"fused": True},
    "torch fused compile": {"fused": True, "compile": True},
    "torch fused graphed": {"fused": True, "graphed": True},
    "dlkernels": {"convert": True},
    "dlkernels graphed": {"convert": True, "graphed": True},
}


def run_step(name, batch):
    """One model's whole training steps."""
    set_precision("float32")
    model = models.MODELS[name]
    exact = float(models.torch_step(model, batch, dtype=torch.float64)())
    options = dict(STEPS)
    if len(model.image) == 3:
        for provider in list(STEPS):
            options[f"{provider} channels_last"] = STEPS[provider] | {"channels_last": True}
    steps, found = {}, {}
    for provider, how in options.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[provider] = models.torch_step(model, batch, device="cuda", **how)
        error = abs(float(steps[provider]()) - exact) / exact
        peak = torch.cuda.max_memory_allocated() - before
        found[provider] = {"error": error, "peak": peak}
    times = time_turns(steps)
    return {
        "op": "step",
        "case": f"{model.text}, batch {batch}",
        "mode": "train",
        "small": False,
        "busy_cores": 0.0,
        "providers": {p: {**found[p], "seconds": times[p]} for p in found},
        "failed": {},
    }


def main(path):
    roof = roofs()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "date": datetime.date.today().isoformat(),
        "roofs": roof,
    }
    results = [run(case, p, roof) for case, precisions in CASES for p in precisions]
    results += [run_step(name, m.batches[-1]) for name, m in models.MODELS.items()]
    Path(path).write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    flops = ", ".join(f"{p} {f / 1e12:.0f}" for p, f in roof["flops"].items())
    report.console.print(
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; a copy moves "
        f"{roof['bytes'] / 1e12:.2f} TB/s, PyTorch's products run at (TFLOP/s) {flops}"
    )
    report.show(results)


if __name__ == "__main__":
    main(sys.argv[1])
