"""The README and docs/: links that lead somewhere, and pages that say what the code says."""

import ast
import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType

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
    """In backticks, from the root: what moves is named where it is now. (What a page adds is named above its text.)"""
    text = re.sub(r"^`[\w./]+`:\n\n```(?:python|yaml)$", "", page.read_text(), flags=re.MULTILINE)
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


@functools.cache
def laws_named_in(path: Path) -> set[str]:
    """The numbers behind "Law" in its docstring."""
    told = re.findall(r"[Ll]aws? (\d(?:(?:, | and )\d)*)", ast.get_docstring(ast.parse(path.read_text())) or "")
    return set(re.findall(r"\d", " ".join(told)))


def test_a_law_is_named_where_it_is_tested():
    """And every file that names one is among those that hold it."""
    parts = re.split(r"^## Law (\d)", (ROOT / "docs/laws.md").read_text(), flags=re.MULTILINE)[1:]
    held = {number: set(re.findall(r"`(tests/(?:\w+/)?test_\w+\.py)`", text.partition("\nHeld by ")[2].partition(". That")[0]))
            for number, text in zip(parts[::2], parts[1::2], strict=True)}  # fmt: skip
    assert [*held] == [*"1234567"] and all(held.values())
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    named = {number: {str(f.relative_to(ROOT)) for f in files if number in laws_named_in(f)} for number in held}
    assert named == held


@pytest.fixture(scope="module")
def configuration() -> ModuleType:
    """docs/configuration.py, which makes the tables of its page."""
    spec = importlib.util.spec_from_file_location("docs_configuration", ROOT / "docs/configuration.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_configuration_are_those_of_the_dataclasses(configuration):
    assert configuration.PAGE.read_text() == configuration.page(), "run `python docs/configuration.py`"


def test_every_key_of_every_choice_has_a_meaning_and_a_default(configuration):
    """Whatever a file of conf/ has is a row, and says something of itself."""
    rows = re.findall(r"^\| `([\w.]+)`(?: \(of [^)]*\))? \| ([^|]+) \| ([^|]+) \| ([^|]*) \| ([^|]+) \|$",
                      configuration.PAGE.read_text().partition(configuration.MARK)[2], re.MULTILINE)  # fmt: skip
    assert [key for key, _, _, meaning, _ in rows if not meaning.strip()] == []
    told = {key for key, *_ in rows}
    for name, _, choices in configuration.sections():
        for choice, (_, path) in choices.items():
            tree = configuration.yaml.safe_load(path.read_text())
            keys = tree.get(name, {}) if name and not choice else tree
            keys = {key for key, value in keys.items() if name or not isinstance(value, dict | list)} - {
                "name",
                "experiment",
            }
            below = {f"{key}.{inner}" for key in keys if isinstance(tree.get(key), dict) for inner in tree[key]}
            keys = below | {key for key in keys if not (isinstance(tree.get(key), dict) and tree[key])}
            assert {f"{name}.{key}" if name else key for key in keys} <= told


def test_a_clause_of_a_docstring_is_of_the_fields_that_begin_it(configuration):
    spike = configuration.meanings(configuration.TrainConfig.__annotations__["spike"])
    assert spike["most"] == "so many skips one after another, or rollbacks in all, and the run ends"
    assert spike["window"] == "how many of the last steps they are of"
