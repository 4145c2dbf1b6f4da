"""docs/adding-an-op.md says how leaky_relu was added: all of it, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import guide
from support.common import FULL

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def without(tmp_path):
    """A copy of the tree without the op."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: the copy is of the files that git tracks")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    guide.take_out(tmp_path)
    return tmp_path


def test_the_guide_is_the_tree(without):
    """No other file names the op, and the guide puts back what was there."""
    named = [
        path.relative_to(without)
        for path in without.rglob("*")
        if path.is_file()
        and path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".toml")
        and "leaky" in path.read_text().lower()
        and path.name != "test_adding_an_op.py"
    ]
    assert not named
    guide.apply(without)
    for step in guide.steps():
        assert (without / step.path).read_text() == (ROOT / step.path).read_text()


def test_the_number_of_files():
    new = [step for step in guide.steps() if step.new is not None]
    assert len(new) <= 6 and len(guide.steps()) - len(new) <= 9


@pytest.mark.skipif(not FULL, reason="builds the package: in make test-full")
def test_the_guide_works(without):
    """Its commands, in the copy: the op is built, and its tests pass."""
    guide.apply(without)
    run = {"check": True, "env": os.environ | {"PYTHONPATH": str(without)}}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=without, **run)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "leaky_relu"]
    subprocess.run(command, cwd=without / "tests", **run)
