"""The models whose training steps are timed whole, with PyTorch, JAX, TensorFlow and our kernels.

A provider is a function build(model, batch) -> step; step() does one step of Adam, on always the
same images, and returns the loss. All start from the same weights, so their losses agree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

import dlkernels

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8  # Adam's, everywhere


@dataclass(frozen=True)
class Model:
    text: str
    image: tuple  # C, H, W, or one size for the MLP
    batches: tuple
    layers: Callable

    def torch(self):
        torch.manual_seed(0)
        return nn.Sequential(*self.layers())

    def data(self, batch):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((batch, *self.image), dtype=np.float32)
        return x, rng.integers(10, size=batch)


def conv(c, k, size=3, padding=1):
    return nn.Conv2d(c, k, size, padding=padding), nn.ReLU()


def linear(k, n):
    return nn.Linear(k, n), nn.ReLU()


def pool():
    return nn.MaxPool2d(2)


MODELS = {
    "mlp": Model("MLP 784-256-10", (784,), (32, 256), lambda: (
        *linear(784, 256), nn.Linear(256, 10),
    )),
    "cnn": Model("CNN 32-64, 128-10", (1, 28, 28), (256,), lambda: (
        *conv(1, 32), pool(), *conv(32, 64), pool(),
        nn.Flatten(), *linear(64 * 7 * 7, 128), nn.Linear(128, 10),
    )),
    "lenet": Model("LeNet-5", (1, 28, 28), (64,), lambda: (
        *conv(1, 6, 5, 2), pool(), *conv(6, 16, 5, 0), pool(),
        nn.Flatten(), *linear(16 * 5 * 5, 120), *linear(120, 84), nn.Linear(84, 10),
    )),
    "vgg": Model("VGG-like 64-64-128-128-256-256", (3, 32, 32), (64,), lambda: (
        *conv(3, 64), *conv(64, 64), pool(),
        *conv(64, 128), *conv(128, 128), pool(),
        *conv(128, 256), *conv(256, 256), pool(),
        nn.Flatten(), nn.Linear(256 * 4 * 4, 10),
    )),
}  # fmt: skip


# ---- PyTorch and dlkernels ------------------------------------------------------------------


def torch_step(
    model,
    batch,
    convert=False,
    channels_last=False,
    fused=None,
    compile=False,
    dtype=torch.float32,
    device="cpu",
    graphed=False,
):
    net = model.torch().to(device, dtype)
    x, y = (torch.from_numpy(a).to(device) for a in model.data(batch))
    x = x.to(dtype)
    if channels_last and x.dim() == 4:
        net, x = (a.to(memory_format=torch.channels_last) for a in (net, x))
    if convert:
        dlkernels.convert(net)
        loss_fn = dlkernels.nn.CrossEntropyLoss()
        optimizer = dlkernels.optim.Adam(net.parameters(), LR, (BETA1, BETA2), EPS)
    else:
        loss_fn = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(net.parameters(), LR, (BETA1, BETA2), EPS, fused=fused)

    def forward(x, y):
        return loss_fn(net(x), y)

    if graphed:
        step = dlkernels.graphed(net, loss_fn, optimizer, (x, y))
        return lambda: step(x, y)

    if compile:  # but not the optimizer: its fused step is faster
        forward = torch.compile(forward)

    def step():
        optimizer.zero_grad()
        loss = forward(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# ---- JAX and TensorFlow: images as NHWC, weights as HWIO and (in, out) --------------------------


def native(net):
    """(weight, bias) of every layer that has some, as NumPy arrays."""
    channels = None
    for m in net:
        if isinstance(m, nn.Conv2d):
            channels, weight = m.out_channels, m.weight.permute(2, 3, 1, 0)
        elif isinstance(m, nn.Linear):
            weight = m.weight
            if channels:  # behind the Flatten: its features are HWC here
                weight = weight.view(len(weight), channels, -1).transpose(1, 2).flatten(1)
                channels = None
            weight = weight.T
        else:
            continue
        yield weight.detach().contiguous().numpy(), m.bias.detach().numpy()


def nhwc(x):
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def padding(conv):
    return "SAME" if conv.padding[0] else "VALID"


def jax_step(model, batch):
    import jax
    import jax.numpy as jnp

    net, (x, y) = model.torch(), model.data(batch)
    x, y = jnp.array(nhwc(x)), jnp.array(y)

    def forward(params, x):
        params = iter(params)
        for m in net:
            if isinstance(m, nn.Conv2d):
                w, b = next(params)
                layout = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(
                    x, w, m.stride, padding(m), dimension_numbers=layout
                )
                x = x + b
            elif isinstance(m, nn.Linear):
                w, b = next(params)
                x = x @ w + b
            elif isinstance(m, nn.ReLU):
                x = jax.nn.relu(x)
            elif isinstance(m, nn.MaxPool2d):  # as reduce_window, its gradient would be slow
                n, h, w, c = x.shape
                x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
            elif isinstance(m, nn.Flatten):
                x = x.reshape(len(x), -1)
        return x

    def loss_fn(params, x, y):
        return -jnp.take_along_axis(jax.nn.log_softmax(forward(params, x)), y[:, None], 1).mean()

    @partial(jax.jit, donate_argnums=0)
    def train(state, x, y):
        params, means, squares, t = state
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        t = t + 1
        means = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, means, grads)
        squares = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, squares, grads)
        lr, root = LR / (1 - BETA1**t), jnp.sqrt(1 - BETA2**t)
        params = jax.tree.map(
            lambda p, m, s: p - lr * m / (jnp.sqrt(s) / root + EPS), params, means, squares
        )
        return (params, means, squares, t), loss

    params = [(jnp.array(w), jnp.array(b)) for w, b in native(net)]
    zeros = partial(jax.tree.map, jnp.zeros_like)
    state = params, zeros(params), zeros(params), jnp.zeros(())

    def step():
        nonlocal state
        state, loss = train(state, x, y)
        return loss

    return step


def tensorflow_step(model, batch):
    import tensorflow as tf

    net, (x, y) = model.torch(), model.data(batch)
    x, y = tf.constant(nhwc(x)), tf.constant(y)
    params = [tf.Variable(a) for pair in native(net) for a in pair]
    means, squares = ([tf.Variable(tf.zeros_like(p)) for p in params] for _ in range(2))
    t = tf.Variable(0.0)

    def forward(x):
        pairs = zip(params[::2], params[1::2])
        for m in net:
            if isinstance(m, nn.Conv2d):
                w, b = next(pairs)
                x = tf.nn.bias_add(tf.nn.conv2d(x, w, m.stride, padding(m)), b)
            elif isinstance(m, nn.Linear):
                w, b = next(pairs)
                x = tf.nn.bias_add(x @ w, b)
            elif isinstance(m, nn.ReLU):
                x = tf.nn.relu(x)
            elif isinstance(m, nn.MaxPool2d):
                x = tf.nn.max_pool2d(x, 2, 2, "VALID")
            elif isinstance(m, nn.Flatten):
                x = tf.reshape(x, (len(x), -1))
        return x

    @tf.function
    def train(x, y):
        with tf.GradientTape() as tape:
            z = forward(x)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, z))
        grads = tape.gradient(loss, params)
        t.assign_add(1.0)
        for p, m, s, g in zip(params, means, squares, grads):
            tf.raw_ops.ResourceApplyAdam(
                var=p.handle, m=m.handle, v=s.handle, grad=g, lr=LR,
                beta1=BETA1, beta2=BETA2, epsilon=EPS * tf.sqrt(1 - BETA2**t),
                beta1_power=BETA1**t, beta2_power=BETA2**t,
            )  # fmt: skip
        return loss

    return lambda: train(x, y)


# ---- who takes part: " tuned" behind a name is dlkernels.tune_allocator() -----------------------

PROVIDERS = {
    "torch": torch_step,
    "torch fused": partial(torch_step, fused=True),
    "torch channels_last fused": partial(torch_step, channels_last=True, fused=True),
    "compile": partial(torch_step, channels_last=True, fused=True, compile=True),
    "jax": jax_step,
    "tensorflow": tensorflow_step,
    "dlkernels": partial(torch_step, convert=True),
    "dlkernels channels_last": partial(torch_step, convert=True, channels_last=True),
}


def build(provider, model, batch):
    return PROVIDERS[provider.removesuffix(" tuned")](model, batch)
