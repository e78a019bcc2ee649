"""Who may import whom, read from the syntax tree: the rooms of docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_export

PACKAGE = Path(lora_export.__file__).parent
TOP = {
    "allowed",
    "choices",
    "contracts",
    "escape",
    "errors",
    "finite",
    "folder_files",
    "graph_runs",
    "manifest",
    "patterns",
    "plugins",
    "registered",
    "progress",
    "records",
    "runtime",
    "storage",
    "meta_model",
    "sentence_modules",
    "tasks",
    "version",
    "wording",
}
ROOMS = {
    "checkpoint",
    "adapters",
    "quantization",
    "merging",
    "validation",
    "onnx_export",
    "benchmarking",
    "report",
    "packages",
    "deltas",
    "adapter_tools",
    "fleet",
    "keys",
}
EVERYTHING = (
    TOP
    | ROOMS
    | {
        "api",
        "pipeline",
        "workflows",
        "serving",
        "commands",
        "",
    }
)
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(TOP, TOP),
    **{room: TOP | {room} for room in ROOMS},
    "allowed": TOP | {"quantization"},  # the methods that are read are on its list
    "merging": TOP | {"merging", "checkpoint", "adapters", "quantization", "deltas"},
    "adapter_tools": TOP | {"adapter_tools", "checkpoint", "adapters", "deltas", "merging"},
    "onnx_export": TOP | {"onnx_export", "checkpoint"},
    **dict.fromkeys(
        (
            "api",
            "pipeline",
            "workflows",
            "serving",
            "commands",
            "__main__",
        ),
        EVERYTHING,
    ),
    "": TOP | {"api"},
}


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(room, line) of every import of this package, wherever it stands; relative ones are made absolute."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "lora_export" else [module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module", "__import__",
        ):  # fmt: skip
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lora_export":
                yield (parts[1] if len(parts) > 1 else ""), node.lineno


def violations(source: str, file: Path) -> list[str]:
    """Imports in `file` (relative to the package) that its room may not make."""
    room = file.parts[0] if len(file.parts) > 1 else file.stem.replace("__init__", "")
    package = ("lora_export", *file.parts[:-1])
    may = ALLOWED.get(room, TOP)
    return [
        f"{file}:{line} ({room or 'the package'}) imports {target or 'the package'}"
        for target, line in imported(ast.parse(source), package)
        if target not in may
    ]


def test_rooms_import_only_what_they_may() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    found = [v for f in files for v in violations(f.read_text(encoding="utf-8"), f.relative_to(PACKAGE))]
    assert not found, "\n".join(found)


def test_rooms_are_all_known() -> None:
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix in ("", ".py")}
    assert names - {"__init__", "__main__", "__pycache__"} <= EVERYTHING, names


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("adapters/lora.py", "from lora_export.checkpoint import open_checkpoint"),
        ("adapters/lora.py", "import lora_export.merging.planning.plan"),
        ("validation/run.py", "def f():\n    from lora_export.adapters import read_adapter"),
        ("validation/run.py", "from lora_export import merging"),
        ("checkpoint/reader.py", "from ..merging import plan"),
        ("checkpoint/reader.py", "from .. import merging"),
        ("onnx_export/engines/__init__.py", "from lora_export.quantization.bnb4 import find"),
        ("merging/planning/plan.py", "from lora_export.onnx_export import export"),
        ("storage/files.py", "from lora_export.checkpoint.header import read_header"),
        ("errors.py", "from lora_export import pipeline"),
        ("report/__init__.py", "import importlib\nimportlib.import_module('lora_export.benchmarking')"),
        ("benchmarking/benchmark.py", "if True:\n    from lora_export.commands import main"),
    ],
)
def test_rooms_planted_violation_is_found(file: str, source: str) -> None:
    assert violations(source, Path(file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("merging/planning/plan.py", "from lora_export.quantization.bnb4 import find\nfrom .names import rename"),
        ("onnx_export/engines/dynamo.py", "from lora_export.checkpoint import open_checkpoint"),
        ("commands/merge.py", "from lora_export.merging import merge"),
        ("checkpoint/reader.py", "from lora_export.storage.files import read_json\nimport torch, json"),
    ],
)
def test_rooms_allowed_import_passes(file: str, source: str) -> None:
    assert not violations(source, Path(file))


def too_long(source: str) -> list[str]:
    """A file of more than 400 lines, and functions of more than 60."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [("the file", source.count("\n"), 400)]
    sizes += [(f.name, (f.end_lineno or 0) - f.lineno + 1, 60) for f in functions]
    return [name for name, lines, most in sizes if lines > most]


def test_files_and_functions_are_short() -> None:
    found = {p.relative_to(PACKAGE): too_long(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py")}
    assert len(found) > 100 and {name: what for name, what in found.items() if what} == {}


def test_too_long_file_or_function_is_found() -> None:
    body = "\n".join(["    x = 1"] * 60)
    assert too_long(f"def f():\n{body}\n") == ["f"]
    assert too_long("x = 1\n" * 401) == ["the file"]
