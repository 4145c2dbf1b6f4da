"""A whole training step as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


def graphed(
    model: torch.nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    sample: tuple[Tensor, Tensor],
) -> Step:
    """A training step, captured once as a CUDA graph and replayed: for models so small that
    starting kernels takes longer than running them.

    The step is ``optimizer.zero_grad(); loss(model(input), target).backward(); optimizer.step()``.
    Capturing it changes neither the model nor the optimizer's state: what the warm-up did is
    undone. The optimizer is made ``capturable``. When a learning rate has changed, the step is
    captured again; one that changes at every step is better a tensor on the device, which
    schedulers fill. On the CPU the step runs as it is.

    Args:
        model: an ``nn.Module`` of one input. Its control flow is that of the sample for ever, and
            it must not wait for the device (``.item()``, a print of a value).
        loss: a function of the model's output and the target.
        optimizer: an ``Adam``, ``AdamW`` or ``SGD`` (without dampening) of ``dlkernels.optim`` or
            ``torch.optim``: their state starts with zeros.
        sample: (input, target), two tensors of the shapes, dtypes and device to come.

    Returns:
        A function of (input, target) that takes a step and returns the loss, detached, a tensor
        that the next step overwrites. Batches of another shape, as an epoch's last, run uncaptured.

    Raises:
        TypeError: if the sample is not two tensors, or for another optimizer.
        RuntimeError: if input, target and parameters are not on one device, or the step can't be
            captured (``torch.cuda.graph`` says why).

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """
    if not (isinstance(sample, (tuple, list)) and [*map(torch.is_tensor, sample)] == [True, True]):
        raise TypeError(f"graphed: sample must be (input, target), two tensors, got {type(sample)}")
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)) or any(
        group.get("dampening") for group in optimizer.param_groups
    ):
        raise TypeError("graphed: the optimizer must be Adam, AdamW or SGD without dampening")
    tensors = [*sample, *model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise RuntimeError(
            f"graphed: sample and model must be on one device, got {sorted(map(str, devices))}"
        )

    def step(input: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model(input), target)
        value.backward()
        optimizer.step()
        return value.detach()

    if sample[0].device.type != "cuda":
        return step
    _make_capturable(optimizer, sample[0].device)
    static = [tensor.detach().clone() for tensor in sample]

    def rates() -> list[object]:
        return [
            id(lr) if torch.is_tensor(lr := group["lr"]) else lr for group in optimizer.param_groups
        ]

    def capture() -> tuple[torch.cuda.CUDAGraph, Tensor, list[object]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(sample[0].device), torch.cuda.graph(graph):
            value = step(*static)
        return graph, value, rates()

    with torch.cuda.device(sample[0].device):
        _warm_up(lambda: step(*static), model, optimizer)
    captured = capture()

    def replay(input: Tensor, target: Tensor) -> Tensor:
        nonlocal captured
        if [(t.shape, t.dtype) for t in (input, target)] != [(t.shape, t.dtype) for t in static]:
            return step(input, target)
        if captured[2] != rates():
            captured = capture()
        for tensor, new in zip(static, (input, target)):
            tensor.copy_(new, non_blocking=True)
        captured[0].replay()
        return captured[1]

    return replay


def _make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep on the device what a step reads and changes."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], device=device, dtype=torch.float32)


def _warm_up(
    step: Callable[[], object], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Run the step some times on a stream of its own, so that everything there is to choose or
    allocate is, and put the model and the optimizer back in place."""
    kept = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    had_state = bool(optimizer.state)
    kept += [(t, t.clone()) for t in _state_tensors(optimizer)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)
        if not had_state:  # it starts with zeros: the tensors must stay those that were captured
            for tensor in _state_tensors(optimizer):
                tensor.zero_()
    optimizer.zero_grad(set_to_none=True)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
