"""What results look like: tables on the terminal and in the README, and a plot."""

from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .timing import Others, median, ratio

console = Console(highlight=False, markup=False)
if not console.is_terminal:
    console.width = 150  # a file or a pipe has room for whole tables


# ---- results --------------------------------------------------------------------------------


def is_ours(provider):
    return provider.startswith("dlkernels")


def best(result, wanted):
    """The quickest of the providers whose name `wanted` accepts, or None."""
    times = {name: p["seconds"] for name, p in result["providers"].items() if wanted(name)}
    return min(times, key=lambda name: median(times[name]), default=None)


def against(result, peer, ours):
    """Quartiles of the peer's time over ours."""
    p = result["providers"]
    return ratio(p[peer]["seconds"], p[ours]["seconds"])


def layout(ours):
    return ours.removeprefix("dlkernels").strip()


def time_text(seconds):
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            break
    return f"{seconds / size:.3g} {unit}"


# ---- tables: (header, rows) of text, for the terminal and for Markdown -----------------------


def main_table(results):
    """Every case against the best of all peers. A case has a row for each of our layouts."""
    header = ["op", "case", "mode", "ours", "best peer", "ratio", "[quartiles]"]
    header += ["vs torch", "of roof", "error: ours", "peer's"]
    rows = []
    for result in results:
        peer = best(result, lambda name: not is_ours(name))
        for ours in filter(is_ours, result["providers"]):
            mine = result["providers"][ours]
            q1, q2, q3 = against(result, peer, ours)
            roof, least = max(result["roofs"].items(), key=lambda item: item[1])
            rows.append(
                [
                    result["op"],
                    " ".join([result["case"], layout(ours)]).strip(),
                    result["mode"],
                    time_text(median(mine["seconds"])),
                    peer,
                    f"{q2:.2f}",
                    f"[{q1:.2f}, {q3:.2f}]",
                    f"{against(result, 'torch', ours)[1]:.2f}",
                    f"{least / median(mine['seconds']):.0%} {roof}",
                    f"{mine['error']:.0e}",
                    f"{result['providers'][peer]['error']:.0e}",
                ]
            )
    return header, rows


def small_table(results):
    """How many times faster than each kind of peer, where Python loops take part."""
    kinds = {
        "a Python loop": lambda name: name == "python",
        "NumPy": lambda name: name == "numpy",
        "PyTorch's best": lambda name: name.startswith(("torch", "compile")),
        "JAX": lambda name: name == "jax",
        "TensorFlow": lambda name: name == "tensorflow",
    }
    rows = []
    for result in results:
        ours = best(result, is_ours)
        peers = [best(result, wanted) for wanted in kinds.values()]
        ratios = [f"{against(result, p, ours)[1]:.3g}x" if p else "" for p in peers]
        seconds = median(result["providers"][ours]["seconds"])
        rows.append([result["op"], result["case"], result["mode"], time_text(seconds), *ratios])
    return ["op", "case", "mode", "ours", *kinds], rows


def rich_table(title, header, rows):
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 3 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


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
    small = [r for r in results if r["small"]]
    if small:
        rich_table("How many times faster we are than", *small_table(small))
    rich_table("Against the best peer (ratio above 1: ours is faster)", *main_table(results))
    warn_if_busy("during a case", max(r["busy_cores"] for r in results))
