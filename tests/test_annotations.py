"""`Any` in annotations of contracts and of the report: only where raw JSON comes in or goes out."""

import ast
from pathlib import Path

import lora_export

PACKAGE = Path(lora_export.__file__).parent
ALLOWED = {
    "contracts/adapters.py": 1,  # adapter_config.json, as its trainer wrote it
    "contracts/option.py": 7,  # options of every type, and their JSON
    "contracts/pipelines.py": 3,  # config.json, model_index.json and adapter_config.json
    "report/files.py": 2,  # report.json
}


def any_count(source: str) -> int:
    """How often `Any` stands in a module, its import aside."""
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name | ast.Attribute)]
    return sum("Any" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in names)


def test_annotations_have_any_only_at_raw_json() -> None:
    files = [file for room in ("contracts", "report") for file in (PACKAGE / room).glob("*.py")]
    counts = {f.relative_to(PACKAGE).as_posix(): any_count(f.read_text(encoding="utf-8")) for f in files}
    assert len(files) > 20
    assert {name: n for name, n in counts.items() if n > ALLOWED.get(name, 0)} == {}


def test_annotations_any_count_sees_names_and_attributes() -> None:
    assert any_count("from typing import Any\ndef f(x: dict[str, Any]) -> 'int': ...\ny: typing.Any = 1") == 2
