"""The ops on CUDA. With a GPU: the samples of the CPU's tests, in each dtype, streams, graphs, AMP.
Without one, but with a CUDA build of PyTorch: the same samples as FakeTensors, for their shapes."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import dlkernels
import dlkernels.functional as ours
import test_conv2d
import test_conv2d_relu_max_pool2d
import test_cross_entropy
import test_linear
import test_max_pool2d
import test_mlp
import test_relu
from support.common import check, convert, steps
from support.optim_table import ADAM

NO_KERNELS = dlkernels.info()["cuda_reason"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
fakes = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)
LAST = torch.channels_last


def plain(samples):
    """(args, {}) for samples that are arguments alone."""
    return [(args, {}) for args in samples]


pool_conv = test_conv2d_relu_max_pool2d
# {op: (ours, PyTorch's, [(args, kwargs)], the ops that run)}
OPS = {
    "relu": (ours.relu, F.relu, plain(test_relu.samples()), ("relu",)),
    **{
        op: (*pair, plain(test_linear.samples()), (op, "linear"))
        for op, pair in test_linear.PAIRS.items()
    },
    "mlp": (test_mlp.mlp, test_mlp.stack, plain(test_mlp.samples()), ("mlp",)),
    **{
        op: (*pair, [*test_conv2d.samples(), *test_conv2d.samples(LAST)], (op, "conv2d"))
        for op, pair in test_conv2d.PAIRS.items()
    },
    pool_conv.OP: (
        pool_conv.f,
        pool_conv.torchs,
        [*pool_conv.samples(), *pool_conv.samples(LAST)],
        (pool_conv.OP,),
    ),
    "max_pool2d": (
        ours.max_pool2d,
        F.max_pool2d,
        plain(test_max_pool2d.samples()),
        ("max_pool2d",),
    ),
    "cross_entropy": (
        ours.cross_entropy,
        F.cross_entropy,
        list(test_cross_entropy.samples()),
        ("cross_entropy",),
    ),
}
op = pytest.mark.parametrize("op", OPS)


# ---- without a GPU --------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Collects the ops that run inside: their names, and with their arguments."""

    def __init__(self):
        super().__init__()
        self.names, self.calls = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().partition("::")[2].partition(".")[0])
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def fake(x):
    """As x on CUDA, under FakeTensorMode."""
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return empty.requires_grad_(x.requires_grad)


@fakes
@op
@dtype
def test_fake(op, dtype):
    f, g, samples, _ = OPS[op]

    for args, kwargs in samples:
        args, kwargs = convert((args, kwargs), lambda x: x.to(dtype))
        expected = g(*args, **kwargs)
        with FakeTensorMode(), Ops() as ran:
            fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
            y = f(*fake_args, **fake_kwargs)
            if y.requires_grad:  # not by the engine, which would look for a device
                with torch.no_grad():
                    grads = y.grad_fn(torch.empty_like(y))
        results, wanted = [y], [expected]
        if y.requires_grad:
            tensors = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
            for x, grad in zip(tensors, grads if isinstance(grads, tuple) else (grads,)):
                if x.requires_grad:
                    results.append(grad)
                    wanted.append(x)
        for got, like in zip(results, wanted):
            assert (got.device.type, got.dtype, got.shape) == ("cuda", like.dtype, like.shape)
        assert expected.numel() == 0 or steps(y) == steps(expected)
        # Of ours as a whole, and none of PyTorch's in its place.
        assert any(name.startswith(op.removesuffix("_relu")) for name in ran.names)
        assert ran.names.isdisjoint({"addmm", "convolution", "max_pool2d_with_indices", "nll_loss"})


def compiled_ops(f, args, kwargs):
    """The names of our ops in the graph of f, compiled on these, without gradients: theirs would
    be the engine's, which looks for a device."""
    from torch._dynamo.backends.common import aot_autograd  # which takes seconds to import

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*args, **kwargs)
    (graph,) = graphs
    return set(re.findall(r"dlkernels\.(\w+)", graph.code))


@fakes
@op
def test_compile_fake(op):
    f, _, samples, ran = OPS[op]
    sample = next(s for s in samples if s[0][0].requires_grad and s[0][0].numel())
    with FakeTensorMode():
        args, kwargs = tree_map_only(torch.Tensor, fake, sample)
        assert compiled_ops(f, args, kwargs) == {op}
        y = f(*args, **kwargs)
        with torch.no_grad(), Ops() as backward:
            y.grad_fn(torch.empty_like(y))
        ((func, inputs),) = [call for call in backward.calls if "dlkernels" in call[0].name()]
        assert compiled_ops(func, inputs, {}) == {f"{ran[-1]}_backward"}


@fakes
def test_compile_fake_adam():
    scalars = ADAM.defaults | {"device_lr": torch.ones(()), "found_inf": torch.zeros(())}
    lists = ADAM.group(torch.randn(5), torch.randn(3, 2))
    with FakeTensorMode():
        lists, scalars = tree_map_only(torch.Tensor, fake, (lists, scalars))
        assert compiled_ops(torch.ops.dlkernels.adam_.default, lists, scalars) == {"adam_"}


@fakes
@op
def test_older_device(op):
    """Products, which need compute capability 8.0, are PyTorch's there; all else is ours."""
    f, _, samples, _ = OPS[op]
    product = op.startswith(("linear", "mlp", "conv2d"))
    dlkernels._C.set_cuda_capability(0, 75)
    try:
        args, kwargs = samples[len(samples) // 2]
        with FakeTensorMode(), torch.no_grad():
            args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
            with Ops() as ran:
                f(*args, **kwargs)
    finally:
        dlkernels._C.set_cuda_capability(0, 0)
    names = {func.name().partition(".")[0] for func, _ in ran.calls}
    assert (f"dlkernels::{op}" in names) != product


# ---- with a GPU -----------------------------------------------------------------------------


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    """float32 products as such, or rounded to TF32 by tensor cores."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.cuda
@op
@dtype
def test_values_and_gradients(op, dtype, precision):
    if dtype != torch.float32 and torch.backends.cudnn.allow_tf32:
        pytest.skip("TF32 is of float32")
    f, g, samples, ran = OPS[op]
    backward = [f"{ran[-1]}_backward"]
    for args, kwargs in samples:
        check(f, g, args, kwargs, ran[:1], backward, grad_strides=False, device="cuda", dtype=dtype)


@pytest.mark.cuda
@op
def test_same_bits_twice(op):
    f, _, samples, _ = OPS[op]
    for args, kwargs in samples:
        args, kwargs = convert((args, kwargs), lambda x: x.cuda(), only_floats=False)
        inputs = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.requires_grad]
        results = []
        for _ in range(2):
            y = f(*args, **kwargs)
            results.append([y, *(torch.autograd.grad(y.sum(), inputs) if inputs else ())])
        for a, b in zip(*results):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.cuda
@op
@dtype
def test_sanitized(op, dtype):
    """What gpu_check runs under compute-sanitizer: some samples, whose values others compare."""
    f, _, samples, _ = OPS[op]
    for args, kwargs in samples[::7]:
        args, kwargs = convert((args, kwargs), lambda x: x.cuda(), only_floats=False)
        args, kwargs = convert((args, kwargs), lambda x: x.to(dtype))
        y = f(*args, **kwargs)
        if y.requires_grad:
            y.sum().backward()
    torch.cuda.synchronize()


@pytest.mark.cuda
@op
def test_another_stream(op):
    """The current stream is used: what waits on another one is not overtaken."""
    f, g, samples, _ = OPS[op]
    args, kwargs = convert(samples[len(samples) // 2], lambda x: x.cuda(), only_floats=False)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [torch.zeros_like(x).copy_(x) if torch.is_tensor(x) else x for x in args]
        y = f(*late, **kwargs)
    stream.synchronize()
    with torch.no_grad():
        torch.testing.assert_close(y, g(*args, **kwargs), rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.cuda
@op
def test_graph(op):
    f, _, samples, _ = OPS[op]
    args, kwargs = convert(samples[len(samples) // 2], lambda x: x.cuda(), only_floats=False)
    with torch.no_grad():
        expected = f(*args, **kwargs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = f(*args, **kwargs)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype):
    torch.manual_seed(0)
    kept = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10),
    ).cuda()  # fmt: skip
    losses = {}
    for name in ("torch", "dlkernels"):
        torch.manual_seed(1)
        model = torch.nn.Sequential(*kept)
        model.load_state_dict({k: v.clone() for k, v in kept.state_dict().items()})
        model = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if name == "dlkernels":
            dlkernels.convert(model)
            optimizer = dlkernels.optim.Adam(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        x, target = torch.randn(16, 3, 8, 8).cuda(), torch.randint(10, (16,)).cuda()
        losses[name] = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(model(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[name].append(loss.item())
    assert losses["dlkernels"] == pytest.approx(losses["torch"], rel=0.05)


@pytest.mark.cuda
def test_graphed_step_is_the_step():
    def run(graph):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)
        ).cuda()
        dlkernels.convert(model)
        optimizer = dlkernels.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        batches = [
            (torch.randn(n, 20).cuda(), torch.randint(5, (n,)).cuda()) for n in [8] * 6 + [3]
        ]
        step = dlkernels.graphed(model, dlkernels.nn.CrossEntropyLoss(), optimizer, batches[0])
        if not graph:
            model_loss = dlkernels.nn.CrossEntropyLoss()

            def step(x, target):
                optimizer.zero_grad()
                loss = model_loss(model(x), target)
                loss.backward()
                optimizer.step()
                return loss.detach()

        losses = []
        for batch in batches:
            losses.append(step(*batch).item())
            scheduler.step()
        return losses

    assert run(True) == pytest.approx(run(False), rel=1e-5)


@pytest.mark.cuda
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 2**20 + 1
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("too little memory")
    x = torch.full((n,), -1.0, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3
    y = ours.relu(x)
    assert (y[-1], y[:-1].max()) == (3, 0)


@pytest.mark.cuda
def test_tensors_of_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="same device"):
        ours.linear(torch.randn(2, 3).cuda(), torch.randn(4, 3))


# ---- without CUDA kernels --------------------------------------------------------------------


def test_reason_is_told():
    info = dlkernels.info()
    assert info["cuda"] == (not info["cuda_reason"])


def test_info_on_an_older_device(monkeypatch):
    monkeypatch.setattr(dlkernels._cuda, "REASON", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    kernels = {op: devices["cuda"] for op, devices in dlkernels.info()["kernels"].items()}
    for op in ("linear", "mlp", "conv2d_relu_max_pool2d"):
        assert "cuda:0: our kernel needs compute capability 8.0" in kernels[op]["float16"]
    for op in ("relu", "max_pool2d", "cross_entropy", "adam_"):
        assert kernels[op]["float16"] == "yes"


def test_a_graphed_step_on_the_cpu_is_the_step():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(4, 3), torch.randint(2, (4,))
    step = dlkernels.graphed(model, F.cross_entropy, optimizer, (x, target))
    first = step(x, target)
    assert step(x, target) < first and not first.requires_grad
    with pytest.raises(TypeError, match="sample"):
        dlkernels.graphed(model, F.cross_entropy, optimizer, x)
    with pytest.raises(RuntimeError, match="one device"):
        dlkernels.graphed(model, F.cross_entropy, optimizer, (x.to("meta"), target))
    with pytest.raises(TypeError, match="Adam"):
        other = torch.optim.Rprop(model.parameters())
        dlkernels.graphed(model, F.cross_entropy, other, (x, target))
