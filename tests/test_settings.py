"""stats(), disabled(), set_fallback() and set_precision()."""

import threading

import pytest
import torch

import dlkernels
from dlkernels import _C
from dlkernels import functional as ours
from dlkernels._check import CASES
from support.common import calls


def test_stats():
    dlkernels.reset_stats()
    assert all(n == {"kernel": 0, "torch": 0} for n in dlkernels.stats().values())
    x = torch.randn(3, 4, requires_grad=True)
    ours.relu(x).sum().backward()
    ours.relu(x.double())
    assert dlkernels.stats()["relu"] == {"kernel": 1, "torch": 1}
    assert dlkernels.stats()["relu_backward"] == {"kernel": 1, "torch": 0}


def test_disabled():
    x = torch.randn(3, 4)

    @dlkernels.disabled()
    def off(x):
        """Its text."""
        return ours.relu(x)

    with calls():
        with dlkernels.disabled():
            ours.linear(x, x)
            with dlkernels.disabled():
                ours.linear_relu(x, x)
            ours.relu(x)
        off(x)
        assert off.__name__ == "off" and off.__doc__ == "Its text."
        with dlkernels.disabled(), dlkernels.set_fallback("error"):
            ours.relu(x.double())
    with pytest.raises(ZeroDivisionError), dlkernels.disabled():
        raise ZeroDivisionError
    with calls(kernels=["relu"]):
        ours.relu(x)


def test_disabled_is_the_threads_own():
    x = torch.randn(3, 4)
    inside, checked = threading.Event(), threading.Event()

    def other():
        with dlkernels.disabled():
            inside.set()
            assert checked.wait(60)
            ours.linear(x, x)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with calls(kernels=["relu"]):
        ours.relu(x)
        with dlkernels.disabled():
            ours.relu(x.double())
    with calls():
        checked.set()
        thread.join()
    with calls(kernels=["relu"]):
        ours.relu(x)


def test_disabled_in_many_threads():
    x, wrong = torch.randn(3, 4), []

    def work():
        for _ in range(300):
            with dlkernels.disabled():
                if type(ours.relu(x.double())) is not torch.Tensor:
                    wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(8)]
    with calls():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    with calls(kernels=["relu"]):
        ours.relu(x)


def test_disabled_and_compile():
    x = torch.randn(3, 4)

    def both(x):
        with dlkernels.disabled():
            y = ours.linear(x, x)
        return ours.relu(y)

    compiled, split = (torch.compile(f, fullgraph=True) for f in (ours.relu, both))
    off = torch.compile(dlkernels.disabled()(ours.relu), fullgraph=True)
    for _ in range(2):
        with calls(kernels=["relu"]):
            assert torch.equal(compiled(x), x.relu())
        with calls(), dlkernels.disabled():
            assert torch.equal(compiled(x), x.relu())
    with calls(kernels=["relu"]):
        split(x)
    with calls():
        off(x)
    with calls(kernels=["relu"]):
        ours.relu(x)


def test_set_fallback():
    x = torch.randn(3, 4, dtype=torch.float64)
    with calls(torchs=["relu"]):
        with dlkernels.set_fallback("error"):
            with pytest.raises(
                NotImplementedError, match="relu: dlkernels has no kernel for these"
            ):
                ours.relu(x)
            with dlkernels.set_fallback("torch"):
                ours.relu(x)
            with pytest.raises(NotImplementedError):
                ours.relu(x)
        ours.relu(x)
    dlkernels.set_fallback("error")
    try:
        with pytest.raises(NotImplementedError):
            ours.relu(x)
    finally:
        dlkernels.set_fallback("torch")
    ours.relu(x)


class Subclass(torch.Tensor):
    pass


def gradient_of_a_gradient(f, x, *rest):
    x.requires_grad_()
    torch.autograd.grad(f(x, *rest).sum(), x, create_graph=True)


WITHOUT_KERNEL = {
    "float64": lambda f, *args: f(*(x.double() for x in args)),
    "integers": lambda f, *args: f(*(x.long() for x in args)),
    "complex": lambda f, *args: f(*(x.to(torch.complex64) for x in args)),
    "subclass": lambda f, x, *rest: f(x.as_subclass(Subclass), *rest),
    "sparse": lambda f, x, *rest: f(x.to_sparse(), *rest),
    "mkldnn": lambda f, *args: f(*(x.to_mkldnn() for x in args)),
    "vmap": lambda f, x, *rest: torch.func.vmap(lambda x: f(x, *rest))(x[None]),
    "jvp": lambda f, x, *rest: torch.func.jvp(lambda x: f(x, *rest), (x,), (x,)),
    "grad": lambda f, x, *rest: torch.func.grad(lambda x: f(x, *rest).sum())(x),
    "double backward": gradient_of_a_gradient,
}


@pytest.mark.parametrize("op", [op for op in CASES if not op.endswith("_")])  # no optimizer's
@pytest.mark.parametrize("kind", WITHOUT_KERNEL)
def test_what_has_no_kernel_is_counted(op, kind):
    """Whether PyTorch has it or not; and an error where that was asked for."""
    f, _, shapes = CASES[op]
    args = [torch.randn(shape) for shape in shapes]
    before = dlkernels.stats()
    try:
        WITHOUT_KERNEL[kind](f, *args)
    except (NotImplementedError, RuntimeError) as error:  # PyTorch's
        assert kind in ("integers", "complex", "sparse", "mkldnn") and "of ours" not in str(error)
    names = {f"{name}_backward" for name in CASES} if kind == "double backward" else {op}
    now = dlkernels.stats()
    assert any(now[name]["torch"] > before[name]["torch"] for name in names & {*now})
    with dlkernels.set_fallback("error"), pytest.raises(NotImplementedError, match="has no kernel"):
        WITHOUT_KERNEL[kind](f, *(x.detach() for x in args))


@pytest.mark.parametrize("bad", ["Error", "", None, True, ["error"], torch.zeros(2)])
def test_set_fallback_to_something_else(bad):
    with pytest.raises(ValueError, match='set_fallback: to must be "torch" or "error", got'):
        dlkernels.set_fallback(bad)


def is_ieee():
    """What C++ reads."""
    ieee = _C.set_precision_ieee(False)
    _C.set_precision_ieee(ieee)
    return ieee


def test_set_precision():
    assert not is_ieee()
    with dlkernels.set_precision("ieee"):
        assert is_ieee()
        with dlkernels.set_precision("fast"):
            assert not is_ieee()
        assert is_ieee()
    assert not is_ieee()
    dlkernels.set_precision("ieee")
    assert is_ieee()
    dlkernels.set_precision("fast")
    with pytest.raises(ZeroDivisionError), dlkernels.set_precision("ieee"):
        raise ZeroDivisionError
    assert not is_ieee()


@pytest.mark.parametrize("bad", ["IEEE", "", None, True, ["fast"], torch.zeros(2)])
def test_set_precision_to_something_else(bad):
    with pytest.raises(ValueError, match='set_precision: to must be "ieee" or "fast", got'):
        dlkernels.set_precision(bad)
