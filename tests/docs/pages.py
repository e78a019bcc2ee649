"""The pages and their code blocks.

Before a block, or above it on the page, comments say how it is run: `<!-- with: NAME -->` the scenery that a page's
blocks find in their folder (scenery.py); `<!-- not run: WHY -->` for the next block alone.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>.*?) -->\n)?^(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
RUN = ("bash", "python")


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    code: str
    not_run: str | None


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, m["language"], m["code"], m["why"]) for m in _BLOCK.finditer(text)]


def scenery(page: Path) -> str | None:
    found = re.search(r"<!-- with: (\w+) -->", page.read_text(encoding="utf-8"))
    return found[1] if found else None


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tool(name: str) -> Any:
    """A module of tools/, which import one another by their bare names."""
    folder = str(ROOT / "tools")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
