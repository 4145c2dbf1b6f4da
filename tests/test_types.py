"""Types: annotations on everything public, which `make lint` checks with mypy."""

import inspect
from pathlib import Path

import pytest

import dlkernels
from dlkernels import functional, nn, optim

MODULES = {"dlkernels": dlkernels, "functional": functional, "nn": nn, "optim": optim}


def test_a_typed_script_runs(python):
    script = Path(__file__).parent / "support" / "typed_user.py"
    assert dlkernels.__version__ in python(str(script), "").stdout


def test_checkers_are_told():
    assert (Path(dlkernels.__file__).parent / "py.typed").exists()


def functions():
    """(name, function) of everything public, with the methods that our classes define."""
    for module, values in MODULES.items():
        for name in values.__all__:
            value = getattr(values, name)
            if inspect.isclass(value):
                for method, f in vars(value).items():
                    if inspect.isfunction(f) and (method == "__init__" or method[0] != "_"):
                        yield f"{module}.{name}.{method}", f
            elif inspect.isfunction(value):
                yield f"{module}.{name}", value


@pytest.mark.parametrize("f", [pytest.param(f, id=name) for name, f in functions()])
def test_annotations(f):
    signature = inspect.signature(f)
    parameters = [p for name, p in signature.parameters.items() if name != "self"]
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in parameters), signature
