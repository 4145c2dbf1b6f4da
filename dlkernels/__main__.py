"""The command line: ``dlkernels info`` and ``dlkernels bench``, or ``python -m dlkernels ...``."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

import dlkernels

from ._check import check


def output(text):
    """An argument that names a file to write: what is wrong is said before the work."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder, got {text!r}")
    return path


def threads(text):
    cores = len(os.sched_getaffinity(0))
    if not 1 <= int(text) <= cores:
        raise argparse.ArgumentTypeError(f"must be from 1 to {cores}, got {text!r}")
    return int(text)


def info(args):
    found = dlkernels.info()
    if args.check:
        found["check"] = check()
    print(json.dumps(found, indent=2) if args.json else found)
    return int(any(result != "ok" for result in found.get("check", {}).values()))


def bench(parser, args):
    if args.threads:  # of all frameworks, none of which starts a thread before it is imported
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        torch.set_num_threads(args.threads)
    try:
        from .benchmarks import suite
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        if package not in ("rich", "matplotlib", "numpy"):
            raise
        parser.exit(1, f"dlkernels bench needs {package}: pip install 'dlkernels[bench]'\n")
    for name in args.ops:
        if name not in suite.JOBS:
            known = ", ".join(suite.JOBS)
            parser.error(f"argument OP: invalid choice: {name!r} (choose from {known})")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"argument --plot: must end in .svg or .png, got {str(args.plot)!r}")
    for name in (suite.report.README, suite.report.TABLES) if args.write else ():
        if not suite.report.has_markers(args.write / name):
            parser.error(f"argument --write: {str(args.write / name)!r} has no bench markers")
    try:
        suite.bench(args.ops, args.quick, args.busy, args.json, args.plot, args.write)
    except KeyboardInterrupt:
        parser.exit(130, "stopped by Ctrl-C\n")


def main(argv=None):
    parser = argparse.ArgumentParser("dlkernels", description="Fast kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)

    info_parser = commands.add_parser("info", help="say what this build is and what it runs on")
    info_parser.add_argument("--json", action="store_true", help="as JSON")
    info_parser.add_argument(
        "--check",
        action="store_true",
        help="run every kernel once against PyTorch; exit with 1 where one differs",
    )

    bench_parser = commands.add_parser("bench", help="time the ops against their peers")
    add = bench_parser.add_argument
    add(
        "ops",
        nargs="*",
        metavar="OP",
        help="linear_relu, adam, ..., or mlp, cnn, lenet, vgg: whole steps; all without one",
    )
    add("--threads", type=threads, metavar="N", help="of every framework")
    add("--quick", action="store_true", help="few cases and peers that need no long compilation")
    add("--busy", action="store_true", help="whole steps beside a process that takes a core, too")
    add("--json", type=output, metavar="FILE", help="write every round of every provider")
    add("--plot", type=output, metavar="FILE", help="write a plot, .svg or .png")
    add(
        "--write",
        type=Path,
        metavar="FOLDER",
        help="rewrite the tables and the plot of this source tree: README.md, docs/",
    )

    args = parser.parse_args(argv)
    if args.command == "bench":
        return bench(bench_parser, args)
    return info(args)


if __name__ == "__main__":
    sys.exit(main())
