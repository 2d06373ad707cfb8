"""The pages written by hand keep up with the tree: the tour, the decisions, and every link."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "ARCHITECTURE.md"
ADR = ROOT / "docs" / "adr"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = {"cacheengine", "csrc", "gateway", "router"}
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".lua"}

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_QUOTED = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_TEST = re.compile(r"\bdef (test_\w+)")


def product_files() -> Iterator[str]:
    for folder in sorted(SOURCES):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                yield path.relative_to(ROOT).as_posix()


def quoted(page: Path) -> set[str]:
    """What stands in backticks outside code blocks."""
    return set(_QUOTED.findall(_FENCE.sub("", page.read_text())))


def links(page: Path) -> list[str]:
    """Targets inside this repository."""
    found = _LINK.findall(_QUOTED.sub("", _FENCE.sub("", page.read_text())))
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """Headings as the usual renderers name them."""
    words = (
        re.sub(r"[^\w\- ]", "", text.lower()) for text in _HEADING.findall(_FENCE.sub("", page.read_text()))
    )
    return {text.strip().replace(" ", "-") for text in words}


def decisions() -> list[Path]:
    return sorted(path for path in ADR.glob("*.md") if path.name != "README.md")


def test_the_tour_has_a_paragraph_for_every_file():
    assert sorted(set(product_files()) - quoted(TOUR)) == []


def test_the_tour_shows_no_file_that_is_gone():
    paths = {word for word in quoted(TOUR) if word.split("/")[0] in SOURCES and Path(word).suffix in SUFFIXES}
    assert sorted(paths - set(product_files())) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_test_named_on_a_page_exists(page):
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in _TEST.findall(path.read_text())}
    named = {word for word in quoted(page) if re.fullmatch(r"test_\w+", word)}
    assert sorted(named - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    dead = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


def test_decisions_are_numbered_without_a_gap():
    numbers = [path.name[:5] for path in decisions()]
    assert numbers == [f"{n:04}-" for n in range(1, len(numbers) + 1)]


def test_every_decision_is_on_the_list_in_order():
    assert [Path(target).name for target in links(ADR / "README.md")] == [path.name for path in decisions()]


@pytest.mark.parametrize("page", decisions(), ids=lambda page: page.stem)
def test_a_decision_is_one_page_with_its_three_parts(page):
    text = page.read_text()
    assert text.startswith(f"# {page.name[:4]}. ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert text.count("\n") <= 60
