"""Every test that takes `machine` runs on each instruction set, with one thread and with two."""

import pytest
import torch

import dlkernels
from dlkernels import _C

ISAS = [isa for isa in ("baseline", "avx2", "avx512") if _C.set_isa(isa)]  # the last is the best


@pytest.fixture(
    params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids="{0[0]}-{0[1]}".format
)
def machine(request):
    isa, threads = request.param
    before = torch.get_num_threads()
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    yield isa
    torch.set_num_threads(before)
    _C.set_isa(ISAS[-1])


@pytest.fixture
def ieee():
    """For tests that compare with the error of PyTorch's direct convolution."""
    with dlkernels.set_precision("ieee"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` need a GPU and our kernels for it."""
    reason = "there is no GPU" if not torch.cuda.is_available() else dlkernels.info()["cuda_reason"]
    if reason:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))
