"""What every example shows after its training: a table and a PNG of plots."""

import io
import math
import statistics

import torch
from matplotlib.figure import Figure
from rich.table import Table

from harness import console, write_whole


def median_seconds(history, kernels):
    return statistics.median(epoch[kernels]["seconds"] for epoch in history)


def print_table(title, rows):
    """A table of [{column: text}]; what a row lacks stays empty."""
    table = Table(title=title)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        is_name = column in ("", "kernels")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    console.print(table)


def summarize(histories, metrics):
    """A row for every name and kernels: the last epoch and, against the first kernels, how much
    faster an epoch is and how far apart the loss curves ever are."""
    rows = []
    for name, history in histories.items():
        first = next(iter(history[0]))
        for kernels, last in history[-1].items():
            row = {"": name if kernels == first else ""} if len(histories) > 1 else {}
            row["kernels"] = kernels
            row |= {column: form.format(last[key]) for key, (column, form, _) in metrics.items()}
            seconds = median_seconds(history, kernels)
            row["seconds an epoch"] = f"{seconds:#.3g}"
            if kernels != first:
                row["speed-up"] = f"{median_seconds(history, first) / seconds:.2f}x"
                apart = max(abs(epoch[first]["loss"] - epoch[kernels]["loss"]) for epoch in history)
                row["losses apart"] = f"{apart:.1e}"
            rows.append(row)
    return rows


def draw_curves(axes, histories, metric, name, form, scale):
    """A metric against epochs. Curves of one name should coincide: a thin dashed line over a wide
    pale one shows both."""
    for i, (label, history) in enumerate(histories.items()):
        looks = ({"lw": 5, "alpha": 0.35}, {"ls": "--"}) if len(history[0]) > 1 else ({},)
        for j, (kernels, look) in enumerate(zip(history[0], looks)):
            if len(histories) > 1:
                look |= {"color": f"C{i}", "label": label if j == 0 else None}
            else:
                seconds = median_seconds(history, kernels)
                look |= {"label": f"{kernels}, {seconds:.3g} s an epoch"}
            marker = "." if len(history) <= 100 else ""
            values = [epoch[kernels][metric] for epoch in history]
            axes.plot(range(1, len(values) + 1), values, marker=marker, **look)
    axes.set(xlabel="epoch", ylabel=name, yscale=scale)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    is_compared = len(histories) > 1 and len(history[0]) > 1
    axes.legend(title="wide: torch, dashed: dlkernels" if is_compared else None)


def draw_images(axes, images, columns):
    """Tensors [N, height, width] side by side, in rows of `columns`."""
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=torch.nan)
    rows = [torch.cat(list(row), dim=1) for row in images.split(columns)]
    axes.imshow(torch.cat(rows).numpy(), cmap="gray")
    axes.axis("off")


def report(path, title, histories, metrics, draws=None):
    """Print a table of all runs and draw their learning curves to `path`.

    Args:
        histories: {name: history}; a history has an item an epoch,
            {kernels: {metric: value, "seconds": value}}
        metrics: {metric: (name, format in the table, scale in the plot)}
        draws: {metric or title of one more panel: function of the panel's axes}
    """
    histories = {name: history for name, history in histories.items() if history}
    if not histories:  # stopped in the first epoch
        return
    epochs = max(map(len, histories.values()))
    title += f", {epochs} epochs, {torch.get_num_threads()} threads"
    print_table(title, summarize(histories, metrics))

    panels = list(dict.fromkeys([*metrics, *(draws or {})]))
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 4.5 * rows), layout="constrained")
    figure.suptitle(title)
    for panel, axes in zip(panels, figure.subplots(rows, columns, squeeze=False).flat):
        if panel in metrics:
            draw_curves(axes, histories, panel, *metrics[panel])
        else:
            axes.set_title(panel)
        if panel in (draws or {}):
            draws[panel](axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getbuffer())
    console.print(f"plots: {path}", soft_wrap=True)
