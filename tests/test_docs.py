"""What the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_every_promise_has_its_tests():
    defined = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in ROOT.glob("tests/test_*.py")
    }
    names = re.findall(r"`([^`]+)`", (ROOT / "docs" / "promises.md").read_text())
    for name in names:
        if name.startswith("tests/"):
            assert list(ROOT.glob(name)), name
        elif name.startswith("test_"):
            file, _, test = name.partition("::") if ".py" in name else ("", "", name)
            assert not file or list(ROOT.glob(f"tests/{file}")), name
            assert not test or test in defined.get(file, set().union(*defined.values())), name
    assert len(names) > 60


def test_sizes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1500
