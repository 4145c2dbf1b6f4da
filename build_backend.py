"""PEP 517 backend: setuptools, and the torch of the environment that will run dlkernels.

The extension is good for the one torch it was compiled against, and pip's isolated build hides
what is installed. Naming torch as a build requirement would download another one, so the isolated
build looks for torch where the interpreter finds it outside the isolation.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

from setuptools import build_meta

OLDEST, NEWEST = (2, 11), (2, 15)


def _path_outside_isolation():
    # pip isolates by environment variables alone, so the same interpreter without them tells where
    # its packages are: venv, system site, user site and .pth files included. pip's own PYTHONPATH
    # stands in place of the user's, which Linux shows as what pip itself was started with.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    pip, cwd = f"/proc/{os.getppid()}", None
    try:
        with open(f"{pip}/environ", "rb") as file:
            started_with = dict(v.split(b"=", 1) for v in file.read().split(b"\0") if b"=" in v)
        if b"PYTHONPATH" in started_with:
            env["PYTHONPATH"] = os.fsdecode(started_with[b"PYTHONPATH"])
            cwd = os.readlink(f"{pip}/cwd")  # its entries may be relative
    except OSError:
        pass
    ask = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.check_output(ask, env=env, cwd=cwd, text=True).splitlines()[-1])


def require_torch():
    want = f'"torch>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"'
    if importlib.util.find_spec("torch") is None:
        # Appended, so that the build requirements still win.
        sys.path += [p for p in _path_outside_isolation() if p not in sys.path]
        importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        # SystemExit, because pip shows its text without a traceback.
        raise SystemExit(
            f"dlkernels is compiled against the torch that will run it and found none: run "
            f"`pip install {want}`, then install dlkernels again (with --no-build-isolation "
            f"where the installer is not pip)."
        )
    import torch

    if not OLDEST <= tuple(int(n) for n in torch.__version__.split(".")[:2]) <= NEWEST:
        raise SystemExit(
            f"dlkernels needs {want} and found torch {torch.__version__}: install such a torch, "
            f"then install dlkernels again."
        )


def _with_torch(hook):
    @functools.wraps(hook)
    def wrapper(*args, **kwargs):
        require_torch()
        return hook(*args, **kwargs)

    return wrapper


# An sdist holds sources only and needs no torch.
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist

get_requires_for_build_wheel = _with_torch(build_meta.get_requires_for_build_wheel)
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
build_wheel = _with_torch(build_meta.build_wheel)

get_requires_for_build_editable = _with_torch(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
build_editable = _with_torch(build_meta.build_editable)
