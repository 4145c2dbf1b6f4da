"""What results look like: tables on the terminal and in Markdown files, and a plot."""

from contextlib import contextmanager
from math import exp, log

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from .timing import Others, median, ratio

console = Console(highlight=False, markup=False)
if not console.is_terminal:
    console.width = 150  # a file or a pipe has room for whole tables


# ---- results --------------------------------------------------------------------------------


def is_dlkernels(provider):
    return provider.startswith("dlkernels")


def best(result, wanted):
    """The quickest of the providers whose name `wanted` accepts, or None."""
    times = {name: p["seconds"] for name, p in result["providers"].items() if wanted(name)}
    return min(times, key=lambda name: median(times[name]), default=None)


def against(result, peer, provider):
    """Quartiles of the peer's time over ours."""
    p = result["providers"]
    return ratio(p[peer]["seconds"], p[provider]["seconds"])


def against_torch(result, provider, text):
    """The ratio to PyTorch as installed, as text; none where that failed."""
    both = {"torch", provider} <= result["providers"].keys()
    return text(against(result, "torch", provider)[1]) if both else ""


def is_compared(result):
    """Whether we and a peer got through: the others are listed as failed."""
    own = [is_dlkernels(name) for name in result["providers"]]
    return any(own) and not all(own)


def layout(provider):
    return "channels_last" if "channels_last" in provider else ""


def time_text(seconds):
    unit, size = next(
        (unit, size) for unit, size in (("s", 1), ("ms", 1e-3), ("us", 0)) if seconds >= size
    )
    return f"{seconds / (size or 1e-6):.3g} {unit}"


def ratio_text(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def percent_text(x):
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.2g} %"


def error_text(x):
    return f"{x:.0e}" if x else "0"


# ---- tables: a header and rows of text, for the terminal and for Markdown --------------------

KINDS = {
    "a Python loop": lambda name: name == "python",
    "NumPy": lambda name: name == "numpy",
    "PyTorch's best": lambda name: name.startswith(("torch", "compile")),
    "JAX": lambda name: name == "jax",
    "TensorFlow": lambda name: name == "tensorflow",
}
THAN_EAGER, THAN_BEST = "than PyTorch eager", "than the best peer"
# Columns: a peer's time over ours.
RATIOS = {"ratio [quartiles]", "to torch", THAN_EAGER, THAN_BEST, *KINDS}


def summary_text(ratios):
    """The geometric mean, and the smallest and the largest where there are several."""
    if not ratios:
        return ""
    mean = exp(sum(map(log, ratios)) / len(ratios))
    mean, low, high = map(ratio_text, (mean, min(ratios), max(ratios)))
    return mean if len(ratios) == 1 else f"{mean} ({low} to {high})"


def summary_table(results):
    """A row for each op, all its cases together, and for each training step. Eager PyTorch and ours
    are compared in the default layout and as installed, the best of both sides however they ran."""
    eager, peers = {}, {}
    for result in results:
        if result["small"] or result["mode"] == "forward":
            continue
        name = f"step of {result['case']}" if result["op"] == "step" else result["op"]
        ours, peer = best(result, is_dlkernels), best(result, lambda name: not is_dlkernels(name))
        if {"torch", "dlkernels"} <= result["providers"].keys():
            eager.setdefault(name, []).append(against(result, "torch", "dlkernels")[1])
        peers.setdefault(name, []).append(against(result, peer, ours)[1])
    rows = [
        [name, str(len(ratios)), summary_text(eager.get(name)), summary_text(ratios)]
        for name, ratios in peers.items()
    ]
    return ["op or training step", "cases", THAN_EAGER, THAN_BEST], rows


def main_table(results):
    """Every case against the best of all peers. A case has a row for each of our layouts."""
    header = ["op", "case", "ours", "best peer", "ratio [quartiles]", "to torch", "of roofline"]
    rows = []
    for result in results:
        providers = result["providers"]
        peer = best(result, lambda name: not is_dlkernels(name))
        for provider in filter(is_dlkernels, providers):
            seconds = median(providers[provider]["seconds"])
            q1, q2, q3 = against(result, peer, provider)
            roof, min_seconds = max(result["roofs"].items(), key=lambda item: item[1])
            errors = [error_text(providers[name]["error"]) for name in (provider, peer)]
            rows.append(
                [
                    result["op"],
                    f"{result['case']} {provider.removeprefix('dlkernels').strip()}".strip(),
                    time_text(seconds),
                    peer,
                    f"{q2:.2f} [{q1:.2f}, {q3:.2f}]",
                    against_torch(result, provider, ratio_text),
                    f"{percent_text(min_seconds / seconds)} ({roof}-bound)",
                    " / ".join(errors),
                ]
            )
    return [*header, "error, ours / peer's"], rows


def small_table(results):
    """How many times faster than each kind of peer, where Python loops take part."""
    rows = []
    for result in results:
        provider = best(result, is_dlkernels)
        peers = [best(result, wanted) for wanted in KINDS.values()]
        ratios = [ratio_text(against(result, p, provider)[1]) if p else "" for p in peers]
        seconds = median(result["providers"][provider]["seconds"])
        rows.append([result["op"], result["case"], time_text(seconds), *ratios])
    return ["op", "case", "ours", *KINDS], rows


def step_table(results):
    """Every training step: our best provider against the best peer."""
    rows = []
    for result in results:
        provider = best(result, is_dlkernels)
        peer = best(result, lambda name: not is_dlkernels(name))
        providers = [result["providers"][name] for name in (provider, peer)]
        times = [time_text(median(p["seconds"])) for p in providers]
        errors = [error_text(p["error"]) for p in providers]
        q1, q2, q3 = against(result, peer, provider)
        rows.append(
            [
                result["case"],
                f"{provider}, {times[0]}",
                f"{peer}, {times[1]}",
                f"{q2:.2f} [{q1:.2f}, {q3:.2f}]",
                against_torch(result, "dlkernels", "{:.2f}".format),  # as installed, too
                " / ".join(errors),
            ]
        )
    header = ["training step", "our best", "best peer", "ratio [quartiles]", "to torch"]
    return [*header, "loss's error, ours / peer's"], rows


def all_steps_table(results):
    """Time and peak memory of every provider's training steps."""

    def cell(result, name):
        p = result["providers"].get(name)
        if p:
            return f"{time_text(median(p['seconds']))}, {p['peak'] / 1e6:.0f} MB"
        return "failed" if name in result["failed"] else ""

    by_count = sorted(results, key=lambda r: -len(r["providers"]))  # keeps their order
    names = dict.fromkeys(name for r in by_count for name in (*r["providers"], *r["failed"]))
    rows = [[name, *(cell(result, name) for result in results)] for name in names]
    return ["a step takes", *(result["case"] for result in results)], rows


def tables(results):
    """{title: table}"""
    all_steps = [r for r in results if r["op"] == "step"]
    results = list(filter(is_compared, results))
    steps = [r for r in results if r["op"] == "step"]
    results = [r for r in results if r["op"] != "step"]
    forward = [r for r in results if r["mode"] == "forward"]
    training = [r for r in results if r["mode"] != "forward"]
    found = {
        "Small cases, forward and backward (optimizers: a step): a peer's time / ours": small_table(
            [r for r in training if r["small"]]
        ),
        "Forward and backward (optimizers: a step): the best peer's time / ours": main_table(
            [r for r in training if not r["small"]]
        ),
        "Forward alone: the best peer's time / ours": main_table(
            [r for r in forward if not r["small"]]
        ),
        "Whole training steps: the best peer's time / ours": step_table(steps),
        "Time and peak memory of all; tuned: after dlkernels.tune_allocator()": all_steps_table(
            all_steps
        ),
    }
    return {title: table for title, table in found.items() if table[1]}


def is_slower(name, text):
    """Whether this cell of the column `name` says that we are slower: it must be seen."""
    return name in RATIOS and text != "" and float(text.split()[0].replace(",", "")) < 1


# ---- terminal -------------------------------------------------------------------------------


def machine_text(machine):
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['isa']}, "
        f"{machine['threads']} threads, {machine['flops_per_second'] / 1e9:.0f} GFLOP/s at most; "
        f"{versions}; {machine['date']}"
    )


def show_machine(machine, missing):
    console.print(machine_text(machine))
    for name in missing:
        console.print(f"not installed, so left out: {name}")
    warn_if_busy("now", machine["busy_cores"])


def warn_if_busy(when, cores):
    if cores > Others.BUSY:
        text = (
            f"WARNING: other processes kept {cores:.1f} cores busy {when}: do not trust the times"
        )
        console.print(text, style="bold red")


@contextmanager
def progress(total):
    """A bar where a terminal watches; yields the function that names what begins."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda what: bar.update(task, advance=1, description=what)


def show(results):
    for title, (header, rows) in tables(results).items():
        table = Table(title=title)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in rows:
            styles = ("red" if is_slower(name, text) else "" for name, text in zip(header, row))
            table.add_row(*(Text(text, style) for text, style in zip(row, styles)))
        console.print(table)
    for result in results:
        for provider, reason in result["failed"].items():
            console.print(f"failed: {provider}, {result['case']}: {reason}")
    warn_if_busy("during a case", max(r["busy_cores"] for r in results))


# ---- Markdown -------------------------------------------------------------------------------

BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
README, TABLES, PLOT = "README.md", "docs/benchmarks.md", "docs/speed.svg"  # in a source tree


def has_markers(file):
    text = file.read_text() if file.exists() else ""
    return -1 < text.find(BEGIN) < text.find(END)


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([f"**{t}**" if is_slower(name, t) else t for name, t in zip(header, row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewrite(file, text):
    """Replace what stands in the file between the two markers."""
    before, _, rest = file.read_text().partition(BEGIN)
    file.write_text(before + BEGIN + text + END + rest.partition(END)[2])


def write(root, machine, results):
    """The summary to the README of a source tree, all tables and the plot to its docs/."""
    where = f"On {machine_text(machine)}.\n"
    summary = summary_table(list(filter(is_compared, results)))
    rewrite(root / README, f"{where}\n{markdown_table(*summary)}")
    tables_text = "".join(
        f"\n## {title}\n\n{markdown_table(*table)}" for title, table in tables(results).items()
    )
    image = f"![The best peer's time over ours, case by case]({PLOT.removeprefix('docs/')})\n"
    rewrite(root / TABLES, f"{where}\n{image}{tables_text}")
    plot(root / PLOT, machine, results)


# ---- plot -----------------------------------------------------------------------------------

AHEAD, BEHIND = "#0072b2", "#d55e00"  # told apart by colour-blind readers too
MARKS = {"": "o", "channels_last": "s"}


def plot(path, machine, results):
    """A row a case: the best peer's time over ours, on a log axis with a line at 1."""
    results = list(filter(is_compared, results))
    shown = [r for r in results if not r["small"] and r["mode"] != "forward"] or results
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, result in enumerate(shown):
        peer = best(result, lambda name: not is_dlkernels(name))
        own = list(filter(is_dlkernels, result["providers"]))
        for provider in [best(result, is_dlkernels)] if result["op"] == "step" else own:
            q1, q2, q3 = against(result, peer, provider)
            color = AHEAD if q2 >= 1 else BEHIND
            axes.plot([q1, q3], [y, y], color=color, lw=1.5)
            axes.plot(q2, y, MARKS[layout(provider)], color=color, ms=6)
        axes.text(1.01, y, peer, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        if y and result["op"] != shown[y - 1]["op"]:
            axes.axhline(y - 0.5, color="0.8", lw=0.8)
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), [f"{r['op']} {r['case']}" for r in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("best peer's time / ours: right of the line, ours is faster")
    axes.set_title("  best peer:", loc="right", fontsize=8)
    for name, mark in MARKS.items():
        axes.plot([], [], mark, color="0.4", label=name or "PyTorch's default layout")
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(MARKS))
    figure.suptitle(machine_text(machine), fontsize=7)
    with rc_context({"svg.hashsalt": "dlkernels"}):  # the same picture is the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
