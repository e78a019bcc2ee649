"""The tables of docs/how-to/runtimes.md: what each runtime made of each package."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tables import read, table

_WORDS = ("decoder", "encoder", "encoder-decoder", "speech")
_PICTURES = ("vision-language", "pipeline")


def _cells() -> list[dict[str, Any]]:
    return list(read("runtimes-*.json")["cells"])


def _who(cell: dict[str, Any]) -> str:
    """With its version, of which a name such as "transformers 4" has the beginning."""
    name, number = cell["consumer"], cell["version"]
    return f"{name.removesuffix(' ' + number.partition('.')[0])} {number}"


def _found(cell: dict[str, Any]) -> str:
    if cell["result"] != "ok":
        return str(cell["result"])
    if cell["figure"] is not None:
        return f"{cell['figure']:.0e}".replace("e-0", "e-")
    tokens = re.search(r"\d[\d,]* of \d[\d,]* tokens", cell["compared"])
    return tokens[0] if tokens else str(cell["compared"])


def _in_words(cells: Sequence[dict[str, Any]], common: Counter[str], usual: str) -> str:
    """What a runtime makes of one kind of model: packages with one result together, models other than the usual one
    by name."""
    found: dict[str, list[str]] = {}
    for package in sorted({c["package"] for c in cells}, key=lambda name: (name != "merged", name)):
        first, *more = sorted((c for c in cells if c["package"] == package), key=lambda c: -common[c["name"]])
        named = _found(first) if first["name"] == usual else f"{first['name']}: {_found(first)}"
        words = [named, *(f"{c['name'].removeprefix(first['name'] + ', ')}: {_found(c)}" for c in more)]
        found.setdefault("; ".join(words), []).append(f"`{package}`")
    return "<br>".join(f"{', '.join(packages)}: {words}" for words, packages in found.items()) or "not run"


def _grid(kinds: Sequence[str]) -> str:
    """A row for each runtime that was given a model of these kinds."""
    cells = [c for c in _cells() if c["model"] in kinds]
    common = Counter(c["name"] for c in cells)
    kinds = [k for k in kinds if any(c["model"] == k for c in cells)]
    names = {k: max((c["name"] for c in cells if c["model"] == k), key=common.__getitem__) for k in kinds}
    head = ["", *(f"{kind}<br>{name}" for kind, name in names.items())]
    rows = []
    for who in dict.fromkeys(map(_who, cells)):
        own = [c for c in cells if _who(c) == who]
        rows.append([who, *(_in_words([c for c in own if c["model"] == k], common, names[k]) for k in kinds)])
    return table(head, rows)


def runtimes() -> str:
    return _grid(_WORDS)


def runtimes_pictures() -> str:
    return _grid(_PICTURES)


def runtime_commands() -> str:
    rows: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for c in (c for c in _cells() if c["result"] == "ok"):
        packages, models = rows.setdefault((c["consumer"], c["command"]), ([], []))
        packages.append(f"`{c['package']}`")
        models.append(c["model"])
    told = [
        [consumer, f"`{_cut(command)}`", *(", ".join(dict.fromkeys(some)) for some in lists)]
        for (consumer, command), lists in rows.items()
    ]
    return table(["runtime", "loads it", "package", "model"], told)


def _cut(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def runtimes_refused() -> str:
    rows = [
        [_who(c), f"`{c['package']}`", f"{c['model']} ({c['name']})", _cut(c["said"])]
        for c in _cells() if c["result"] == "refused"
    ]  # fmt: skip
    return table(["runtime", "package", "model", "what it says"], rows)
