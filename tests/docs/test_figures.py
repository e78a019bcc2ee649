"""Figures in README.md and docs/ come from result files, and generated pages are those of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_export.commands.main import cli
from tests.docs.pages import ROOT, name, pages, tool

# What is chosen or defined and not measured: margins, tolerances, sizes of what was measured, constants of formats.
DEFINED = {
    "90 %", "99 %", "1 %", "±1 %", "5 %", "15 %", "1.5 ×", "2 GiB", "135M", "1.1B", "7B", "3B", "0.1B", "70B",
    "24 GB", "8 GB", "141 GB", "40 GB", "2.2 GB", "13.5 GB", "8GB", "4GB",
}  # fmt: skip
MEASURED = re.compile(r"(?<![\w.])[±+−-]?\d[\d.,]*(?:–\d[\d.,]*)? ?(?:ms|s|seconds|minutes|MB|GB|GiB|%|×)(?![\w])")
OUTSIDE = re.compile(r"<!-- figures:.*?<!-- end -->|^```.*?^```$|`[^`\n]*`|\]\([^)]*\)", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("tool", ["figures.py", "reference.py"])
def test_generated_pages_are_up_to_date(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr


def measured(text: str) -> list[str]:
    """What reads like a measurement, outside of generated tables and code."""
    return [m for m in MEASURED.findall(OUTSIDE.sub("", text)) if m.strip() not in DEFINED]


@pytest.mark.parametrize("page", [p for p in pages() if "reference" not in p.parts], ids=name)
def test_pages_have_no_measurement_outside_generated_tables(page: Path) -> None:
    assert measured(page.read_text(encoding="utf-8")) == []


def test_planted_measurement_is_found() -> None:
    assert measured("It takes 3.4 s, 12 % and 292 MB; the margin of 1 % is chosen.") == ["3.4 s", "12 %", "292 MB"]
    assert measured("<!-- figures: x -->\n| 3.4 s |\n<!-- end -->\n`--max-time 5s`") == []


def test_changed_result_makes_table_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tool("figures")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.renewed(page) == page
    monkeypatch.setitem(figures.TABLES, "overview", lambda: "\n| 1 |\n")
    assert figures.renewed(page) != page


def test_commands_page_has_every_command() -> None:
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(cli.commands)


def test_navigation_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [name(p) for p in pages() if p.is_relative_to(ROOT / "docs") and name(p)[5:] not in navigation]
    assert missing == []


def test_readme_links_resolve() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), target
