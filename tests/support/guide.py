"""docs/adding-an-op.md as a program: which files it adds, and what it adds to others."""

import re
from dataclasses import dataclass, field
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "adding-an-op.md"
BLOCK = r"```\w+\n(.*?)\n```"


@dataclass
class Step:
    path: str
    new: str | None = None  # the whole file
    edits: list = field(default_factory=list)  # (after, add): blocks of whole lines


def steps():
    """The guide's steps in their order."""
    found = []
    for section in re.split(r"^### ", GUIDE.read_text(), flags=re.M)[1:]:
        kind, path = re.match(r"(New|Edit): `(.+)`\n", section).groups()
        if kind == "New":
            found.append(Step(path, new=re.search(BLOCK, section, re.S)[1] + "\n"))
        else:
            edits = re.findall(rf"^After\n\n{BLOCK}\n\nadd\n\n{BLOCK}", section, re.S | re.M)
            found.append(Step(path, edits=edits))
    return found


def take_out(root):
    """Removes the op from the tree at `root`."""
    for step in steps():
        path = root / step.path
        if step.new is not None:
            path.unlink()
        for after, add in step.edits:
            path.write_text(replaced(path, f"{after}\n{add}\n", f"{after}\n"))


def apply(root):
    """Does what the guide says in the tree at `root`."""
    for step in steps():
        path = root / step.path
        if step.new is not None:
            path.write_text(step.new)
        for after, add in step.edits:
            path.write_text(replaced(path, f"{after}\n", f"{after}\n{add}\n"))


def replaced(path, old, new):
    """The text of a file with `old`, whole lines that stand there once, replaced."""
    text = "\n" + path.read_text()
    assert text.count("\n" + old) == 1, f"{path}: {text.count(old)} times\n{old}"
    return text.replace("\n" + old, "\n" + new)[1:]
