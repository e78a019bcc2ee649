"""The generated pages of docs/reference: commands from click, JSON fields from dataclasses, errors from errors.py,
and report.schema.json and fleet.schema.json from what the readers of these documents ask of them.

python tools/reference.py            # write them again
python tools/reference.py --check    # exit code 1 if one is out of date
python tools/reference.py --errors   # list every refusal: class, file, words
"""

import argparse
import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from generated import ROOT, settle

import lora_export
from lora_export import contracts, errors
from lora_export.commands.main import cli
from lora_export.contracts.figures import NOT_IN_JSON
from lora_export.storage.documents import json_schema

PAGES = ROOT / "docs" / "reference"
WRITTEN = "<!-- written by tools/reference.py -->\n"
DOCUMENTS = {
    "merge": contracts.MergeResult,
    "validate": contracts.ValidationResult,
    "export": contracts.ExportResult,
    "benchmark": contracts.BenchmarkResult,
    "package": contracts.PackageResult,
    "verify": contracts.Verification,
    "merge-and-export": contracts.Story,
    "fleet": contracts.FleetResult,
}
PARTS = (
    contracts.TensorRecord, contracts.Check, contracts.Continuation, contracts.Perplexity, contracts.Deviation,
    contracts.AdapterSurvival, contracts.BaseComparison, contracts.GraphComparison, contracts.Cell,
    contracts.ArmTimes, contracts.Percentile, contracts.Environment, contracts.Gpu, contracts.Finding,
    contracts.BaseCheck, contracts.Interference, contracts.RowOutcome, contracts.RowFigures,
)  # fmt: skip


# --- commands ------------------------------------------------------------------------------------------------


def commands() -> str:
    parts = [WRITTEN, "# Commands\n", "What `lora-export COMMAND --help` says.\n"]
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=f"lora-export {name}", max_content_width=100, terminal_width=100)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


# --- JSON ----------------------------------------------------------------------------------------------------


def json_fields() -> str:
    parts = [
        WRITTEN,
        "# JSON fields\n",
        "What `--json` prints on stdout: one document. A name that is here stays; others may be added. A failure "
        "has `error` (the class), `found`, `where`, `tensor`, `expected`, `next`.\n",
    ]
    for name, result in DOCUMENTS.items():
        parts.append(f"## {name}\n\n{_table(result)}\n")
    parts.append("## Parts of these\n")
    parts += [f"### {part.__name__}\n\n{_table(part)}\n" for part in PARTS]
    return "\n".join(parts)


def _table(of: Any) -> str:
    text = " ".join((inspect.getdoc(of) or "").replace("|", "\\|").split())
    if text.startswith(f"{of.__name__}("):  # what dataclass writes where there is no docstring
        text = ""
    rows = "\n".join(f"| `{name}` | `{kind}` |" for name, kind in fields(of).items())
    return f"{text}\n\n| field | type |\n|---|---|\n{rows}\n".lstrip()


def fields(of: Any) -> dict[str, str]:
    """Name → type of what JSON has of a result."""
    return {f.name: _kind(f.type) for f in dataclasses.fields(of) if f.metadata != NOT_IN_JSON}


def _kind(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if not isinstance(annotation, str | type):
        text = str(annotation)
    for name in ("lora_export.contracts.", "typing.", "collections.abc.", "pathlib."):
        text = text.replace(name, "")
    text = re.sub(
        r"\b(adapters|benchmark|export|figures|fleet|merging|packages|story|tensors|validation)\.", "", text
    )
    text = re.sub(
        r"tuple\[([^\[\]]+|[^\[\]]*\[[^\[\]]*\]), \.\.\.\]", r"list[\1]", text.replace("verification.", "")
    )
    return (
        re.sub(r"\bFigure\b", "float", text.replace("Path", "str")).replace("Mapping", "dict").replace("|", "\\|")
    )


# --- documents -----------------------------------------------------------------------------------------------


def schema(name: str, of: type) -> str:
    """JSON Schema of a document, from the types that its reader decodes."""
    return json.dumps({"title": f"{name} of lora-export"} | json_schema(of), indent=1) + "\n"


# --- errors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A place that raises: the class, the module, and its words, … for what is filled in."""

    error: str
    module: str
    words: str


# Functions of quantization/stored.py that make a CheckpointError → which argument holds the words.
_OF_A_FORMAT = {"odd": 1, "unread": 0}


def refusals() -> list[Refusal]:
    """Every place in the package that makes a LoraExportError."""
    package = Path(lora_export.__file__).parent
    names = {e.__name__ for e in classes()}
    found = []
    for file in sorted(package.rglob("*.py")):
        module = file.relative_to(package).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            if isinstance(node.func, ast.Name) and node.func.id in names:
                found.append(Refusal(node.func.id, module, _words(node.args[0])))
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "refuse":  # of an AdapterFile
                found.append(Refusal(errors.AdapterError.__name__, module, _words(node.args[0])))
            elif isinstance(node.func, ast.Name) and node.func.id in _OF_A_FORMAT and "quantization/" in module:
                words = _words(_assigned(node.args[_OF_A_FORMAT[node.func.id]], tree))
                found.append(Refusal(errors.CheckpointError.__name__, module, words))
    return found


def _assigned(node: ast.expr, tree: ast.AST) -> ast.expr:
    """What was last assigned to a local name before it is used; other expressions as they are."""
    if not isinstance(node, ast.Name):
        return node
    assigned = [a for a in ast.walk(tree) if isinstance(a, ast.Assign) and a.lineno < node.lineno]
    values = [a.value for a in assigned if getattr(a.targets[0], "id", "") == node.id]
    return max(values, key=lambda value: value.lineno, default=node)


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp):
        return _words(node.left) + _words(node.right)
    return "…"


def classes() -> list[type[errors.LoraExportError]]:
    """The classes that are raised, in the order of errors.py."""
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type)
        and issubclass(value, errors.LoraExportError)
        and value is not errors.LoraExportError
    ]


def error_page() -> str:
    parts = [
        WRITTEN,
        "# Errors\n",
        "An error says what was found, in which file and tensor, what was expected, and what to try next. With "
        "`--json` its class is `error`; in Python it is what you catch, and all are "
        "`lora_export.errors.LoraExportError`. Exit code 1, but for GateFailed (3).\n",
    ]
    listed = refusals()
    for error in classes():
        words = sorted({(r.words, r.module) for r in listed if r.error == error.__name__ and r.words.strip("… :")})
        parts.append(f"## {error.__name__}\n\n{inspect.getdoc(error)}\n")
        rows = [f"| {_cell(text)} | `{module}` |" for text, module in words]
        parts.append("\n".join(["| what it says | raised in |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    for sign in "\\|<>*_`[]{}":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


# --- all -----------------------------------------------------------------------------------------------------


def pages() -> Iterator[tuple[Path, str]]:
    yield PAGES / "commands.md", commands()
    yield PAGES / "json.md", json_fields()
    yield PAGES / "errors.md", error_page()
    yield PAGES / "report.schema.json", schema("report.json", contracts.Report)
    yield PAGES / "fleet.schema.json", schema("fleet.json", contracts.FleetReport)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--errors", action="store_true")
    args = parser.parse_args()
    if args.errors:
        for refusal in refusals():
            print(f"{refusal.error:<20} {refusal.module:<40} {refusal.words}")
        return
    settle(pages(), args.check)


if __name__ == "__main__":
    main()
