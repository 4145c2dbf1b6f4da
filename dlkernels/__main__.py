"""The command line: ``python -m dlkernels info``, or ``dlkernels info``."""

import argparse
import json

import dlkernels


def main(argv=None):
    parser = argparse.ArgumentParser("dlkernels", description="Fast CPU kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="say what this build is and what it runs on")
    info.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    found = dlkernels.info()
    print(json.dumps(found, indent=2) if args.json else found)


if __name__ == "__main__":
    main()
