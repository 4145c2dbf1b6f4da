"""All cases, and what running one gives: a plain dict, which report.py shows and --json keeps."""

import datetime
import hashlib
import json
import os
import platform
import time
from functools import partial
from glob import glob
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import dlkernels

from . import (
    bench_conv2d_relu,
    bench_conv2d_relu_max_pool2d,
    bench_cross_entropy,
    bench_linear_relu,
    bench_max_pool2d,
    bench_optim,
    bench_relu,
    report,
    steps,
)
from .case import PEERS, SEPARATE, TRIED, is_one_of, missing, time_case
from .timing import Failed, Others, attempts, copy_roof, fma_roof, interleave
from .worker import Workers

MODULES = (
    bench_linear_relu,
    bench_conv2d_relu,
    bench_conv2d_relu_max_pool2d,
    bench_max_pool2d,
    bench_relu,
    bench_cross_entropy,
    *bench_optim.OPTIMIZERS,
)
OPS = {module.SMALL.op: module for module in MODULES}
SETTINGS = ("MALLOC_", "GLIBC_", "LD_PRELOAD", "THP_", "OMP_", "GOMP_", "DLKERNELS_", "ATEN_")

# Before their first import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def cases(op, quick=False):
    """The cases of an op, the one for Python loops first."""
    module = OPS[op]
    return [module.SMALL, *module.CASES[: 2 if quick else None]]


def providers(case, quick=False):
    """Who computes a case, by name."""
    out = {*missing()}
    if case != OPS[case.op].SMALL:
        out |= {"python", "numpy"}  # seconds a call
    if quick:
        out |= {"compile", "compile channels_last", "tensorflow"}  # seconds to compile
    return {name: build for name, build in case.providers.items() if name not in out}


WRONG = 1e-2  # nobody's rounding: as torch.compile's on AVX2


def prepare(case, mode, builds, workers=None):
    """Builds every provider's step and calls it once; without `workers` all in this process.

    Returns:
        {name: step}, {name: its largest error against float64, of the largest value} and
        {name: why it failed}: a peer may. The step of a separate provider has a process of its own,
        and calling it gives the seconds that a call took there.
    """
    inputs = case.arrays(mode)
    run, arrays = case.exact(inputs)
    exact = [np.array(a) for a in arrays(run())]

    def first(name):
        if workers is not None and is_one_of(SEPARATE + TRIED, name):
            workers[name].begin(time_case, case, inputs, name)
            step, results = workers[name].ask, workers[name].answer()
        if workers is None or not is_one_of(SEPARATE, name):
            step, arrays = builds[name](case, inputs)
            results = arrays(step())
        if [r.shape for r in results] != [e.shape for e in exact]:
            raise Failed("its results are of other shapes")
        error = max(float(np.abs(r - e).max() / np.abs(e).max()) for r, e in zip(results, exact))
        if error > WRONG:
            raise Failed(f"its results are off by {error:.0e}")
        return step, error

    failed = {}
    found = attempts(first, builds, failed)
    steps, errors = ({name: both[i] for name, both in found.items()} for i in range(2))
    return steps, errors, failed


def run(case, mode, quick, machine, workers):
    """Time all providers of a case beside one another."""
    steps, errors, failed = prepare(case, mode, providers(case, quick), workers)
    others = Others()
    short = {"rounds": 10, "seconds": 0.3, "share": 1.0} if quick else {}
    separate = {name: steps.pop(name) for name in list(steps) if is_one_of(SEPARATE, name)}
    times = interleave(steps, failed, separate, **short)
    busy = others.cores()
    flops, size = case.flops(mode), case.bytes(mode)
    return {
        "op": case.op,
        "case": str(case),
        "mode": mode,
        "small": case == OPS[case.op].SMALL,
        "flops": flops,
        "bytes": size,
        "roofs": {  # seconds
            "compute": flops / machine["flops_per_second"],
            "memory": size / copy_roof(case.footprint(mode)),
        },
        "busy_cores": busy,
        "providers": {
            name: {"seconds": times[name], "error": error}
            for name, error in errors.items()
            if name in times
        },
        "failed": failed,
    }


def op_jobs(op, quick):
    """What there is to run of an op: {what: function of (machine, workers), returns a result}."""
    return {
        f"{op} {case} {mode}": partial(run, case, mode, quick)
        for case in cases(op, quick)
        for mode in (case.modes[-1:] if quick else case.modes)
    }


# All that `dlkernels bench` knows by name.
JOBS = {
    **{op: partial(op_jobs, op) for op in OPS},
    **{model: partial(steps.jobs, model) for model in steps.MODELS},
}


def cpu_model():
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return models[0] if models else platform.machine()


def build():
    """A digest of dlkernels, its sources in Python included."""
    root, digest = Path(dlkernels.__file__).parent, hashlib.sha256()
    for pattern in ("**/*.py", "*.so"):
        for name in sorted(glob(pattern, root_dir=root, recursive=True)):
            digest.update((root / name).read_bytes())
    return digest.hexdigest()[:16]


def machine():
    """What the times were taken on."""
    others = Others()
    time.sleep(0.3)
    busy = others.cores()
    peers = [name for name in PEERS if name not in missing()]
    installed = metadata.packages_distributions()  # no import: that could end this process
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": dlkernels.info()["isa"],
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            **{name: metadata.version(installed[name][0]) for name in peers},
        },
        "build": build(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)},
        "date": datetime.date.today().isoformat(),
        "flops_per_second": fma_roof(),
        "busy_cores": busy,
    }


def save(file, where, quick, results, complete=False):
    """Write what there is, so that the file is whole at any time."""
    listed = [{"job": what, **result} for what, result in results.items()]
    found = {"complete": complete, "quick": quick, "machine": where, "results": listed}
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, file)


CHANGES = ("date", "flops_per_second", "busy_cores")  # from run to run


def earlier(file, where, quick):
    """{job: result} of a run that was interrupted, of the same build on the same machine."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if found.get("complete", True) or found["quick"] != quick:
        return {}
    if any(found["machine"].get(key) != where[key] for key in where if key not in CHANGES):
        return {}
    return {result["job"]: result for result in found["results"]}


def bench(names, quick=False, busy=False, json_file=None, plot=None, root=None):
    """The command ``dlkernels bench``."""
    where = machine()
    report.show_machine(where, missing())
    jobs = {}
    for name in names or ((*OPS, *steps.QUICK) if quick else JOBS):
        jobs |= JOBS[name](quick)
        if busy and name in steps.MODELS:
            jobs |= steps.jobs(name, quick, busy)
    found = earlier(json_file, where, quick) if json_file else {}
    results = {what: found[what] for what in jobs if what in found}
    if results:
        report.console.print(f"goes on from {len(results)} of {len(jobs)} results in {json_file}")
    with report.progress(len(jobs)) as begin, Workers() as workers:
        for what, job in jobs.items():
            begin(what)
            if what not in results:
                results[what] = job(where, workers)
                if json_file:
                    save(json_file, where, quick, results)
    results = {what: results[what] for what in jobs}  # in order
    report.show(list(results.values()))
    if plot:
        report.plot(plot, where, list(results.values()))
    if root:
        report.write(root, where, list(results.values()))
    if json_file:
        save(json_file, where, quick, results, complete=True)
