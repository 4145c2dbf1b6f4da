"""Fit the noisy sine of optimizers.py under four schedules of the learning rate.

    python examples/schedules.py
    python examples/schedules.py --kernels dlkernels --lr 0.02

torch.optim.lr_scheduler drives dlkernels' optimizer as it drives PyTorch's. A constant rate ends
where the noise of its batches keeps it; a decaying one goes on down to the noise of the data.
"""

import argparse
from functools import partial

from torch.optim import lr_scheduler

import harness
import optimizers
import results

METRICS = {  # name, format in the table, scale in the plot
    "lr": ("learning rate", "{:.2g}", "log"),
    "loss": ("mean squared error", "{:.5f}", "log"),
}
SCHEDULES = {  # of `epochs`
    "constant": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1),
    "step": lambda optimizer, epochs: lr_scheduler.StepLR(optimizer, epochs // 3 + 1, gamma=0.1),
    "exponential": lambda optimizer, epochs: lr_scheduler.ExponentialLR(
        optimizer, 0.01 ** (1 / epochs)
    ),
    "cosine": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, epochs),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    args = harness.parse_arguments(parser, "schedules.png", epochs=60, batch_size=16, lr=0.01)

    x, y = optimizers.load_sine()

    def make_run(kernels, schedule):
        run = optimizers.make_run(kernels, lambda optim, p: optim.SGD(p, args.lr, momentum=0.9))
        run.scheduler = schedule(run.optimizer, args.epochs)
        return run

    make_batches = partial(harness.make_batches, x, y, args.batch_size, args.seed)

    def next_rate(run):
        (lr,) = run.scheduler.get_last_lr()
        run.scheduler.step()
        return {"lr": lr}

    fits, histories = {}, {}
    with harness.progress(len(SCHEDULES) * args.epochs) as advance:
        for name, schedule in SCHEDULES.items():
            fits[name] = harness.make_runs(args, partial(make_run, schedule=schedule))
            histories[name] = []
            for epoch in harness.train(fits[name], range(args.epochs), make_batches, next_rate):
                histories[name].append(epoch)
                advance()

    title = f"Schedules of SGD with momentum, batch {args.batch_size}, seed {args.seed}"
    draws = {"data and fits": lambda axes: optimizers.draw_fits(axes, fits, x, y)}
    results.report(args.plot, title, histories, METRICS, draws)


if __name__ == "__main__":
    harness.run(main)
