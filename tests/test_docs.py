"""The README and docs/: links that lead somewhere, and pages that say what the code says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors_of(page: Path) -> set[str]:
    """The names that its headings have in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(there), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    """In backticks, from the root: what moves is named where it is now."""
    text = page.read_text()
    rooms = "conf|launch|trainer|parallel|optim|kernels|tests|benchmarks|docs"
    for name in re.findall(rf"`((?:{rooms})/[\w./]*)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    for name in re.findall(r"results/(\w+\.(?:json|jsonl|png))\b", text):
        assert (ROOT / "benchmarks/results" / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 250
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\((docs/[\w.-]+\.md)\)", text))


def test_a_measured_claim_has_its_results_file():
    """The README's short table: the last cell of every row."""
    table = (ROOT / "README.md").read_text().partition("| claim | measured | results |")[2]
    rows = re.findall(r"^\| .* \| `(.+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 8 and all((ROOT / "benchmarks/results" / name).exists() for name in rows)
