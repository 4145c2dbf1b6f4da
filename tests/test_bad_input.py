"""No argument crashes, hangs or takes terabytes, and what PyTorch refuses we refuse alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlkernels
from support.bad_input import GROUPS


@pytest.mark.parametrize("group", GROUPS)
def test_bad_input(group):
    program = Path(__file__).parent / "support" / "bad_input.py"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", program, group],
        env=os.environ | {"PYTHONPATH": str(Path(dlkernels.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    wrong = [line for line in done.stdout.splitlines() if "WRONG" in line]
    assert done.returncode == 0, (wrong[:20], done.stdout[-500:], done.stderr[-3000:])
    assert done.stdout.endswith("done: 0 wrong\n")
