"""Cells of the table of runtimes are collected into a result, and a table of it says what they say."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.consumers import answers
from tests.consumers.answers import Cell
from tests.docs.pages import tool

AROUND = {"machine": {"cpu": "one"}, "versions": {}}
DECODER = Cell("vLLM", "0.32", "hf", "decoder", "SmolLM2", "vllm serve .", "ok", "192 of 192 tokens of 6 prompts")


@pytest.fixture
def runtimes() -> Any:
    return tool("runtimes")


def keep(folder: Path, **changes: Any) -> None:
    """A cell, as a test keeps it."""
    cell = replace(DECODER, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "PLACE", folder)
        told = (cell.consumer, cell.version, cell.package, cell.model, cell.name, cell.command)
        with answers.cell(*told) as kept:
            kept.result, kept.compared, kept.figure, kept.said = cell.result, cell.compared, cell.figure, cell.said


def called(runtimes: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(runtimes, "circumstances", lambda *_: AROUND)
    monkeypatch.setattr(sys, "argv", ["runtimes.py", *map(str, words)])
    return int(runtimes.main())


def test_gather_keeps_earlier_cells_and_names_them(
    runtimes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [replace(DECODER, date="2026-01-02"), replace(DECODER, package="gguf", date="2026-01-02")]
    earlier = {"machines": {"2026-01-02": {"machine": "old"}}, "cells": [c.__dict__ for c in old]}
    (tmp_path / "runtimes-2026-01-02.json").write_text(json.dumps(earlier))
    keep(tmp_path / "answers", version="0.33")
    assert called(runtimes, monkeypatch, "--gather", tmp_path / "answers", "--out", tmp_path) == 0
    result = runtimes.newest(tmp_path)
    assert [(c["package"], c["version"]) for c in result["cells"]] == [("gguf", "0.32"), ("hf", "0.33")]
    assert [m["machine"] for m in result["machines"].values()] == ["old", {"cpu": "one"}]
    assert "not run again since 2026-01-02: vLLM: gguf, decoder (SmolLM2)" in capsys.readouterr().out


def test_gather_of_failed_cell_writes_nothing(
    runtimes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path / "answers")
    with pytest.raises(AssertionError, match="compared nothing"):
        keep(tmp_path / "answers", package="merged", result="failed")
    assert called(runtimes, monkeypatch, "--gather", tmp_path / "answers", "--out", tmp_path) == 1
    assert "vLLM: merged, decoder (SmolLM2): the test compared nothing" in capsys.readouterr().err
    assert not list(tmp_path.glob("runtimes-*"))


def test_gather_of_nothing_writes_nothing(runtimes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(runtimes, monkeypatch, "--gather", tmp_path, "--out", tmp_path) == 1


def test_run_of_failing_tests_writes_nothing(
    runtimes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that keep a cell and fail afterwards."""

    def failing(words: list[str], folder: Path) -> int:
        keep(folder)
        return 1

    monkeypatch.setattr(runtimes, "run", failing)
    assert called(runtimes, monkeypatch, "-k", "vllm", "--out", tmp_path) == 1
    assert not list(tmp_path.glob("runtimes-*"))


def test_table_says_what_each_cell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tool("runtime_tables")
    cells = [
        DECODER,
        replace(DECODER, package="merged"),
        replace(DECODER, name="SmolLM2, by HTTP", compared="6 texts"),
        replace(DECODER, package="gguf", result="refused", said="no | GGUF"),
        replace(DECODER, consumer="fastembed", model="encoder", name="MiniLM", compared="3 vectors", figure=3.6e-7),
    ]
    monkeypatch.setattr(tables, "read", lambda _: {"cells": [c.__dict__ for c in cells]})
    assert tables.runtimes().splitlines()[1:-1] == [
        "|  | decoder<br>SmolLM2 | encoder<br>MiniLM |",
        "| --- | --- | --- |",
        "| vLLM 0.32 | `merged`: 192 of 192 tokens<br>`gguf`: refused<br>"
        "`hf`: 192 of 192 tokens; by HTTP: 6 texts | not run |",
        "| fastembed 0.32 | not run | `hf`: 4e-7 |",
    ]
    assert "| vLLM | `vllm serve .` | `hf`, `merged` | decoder |" in tables.runtime_commands()
    assert "| vLLM 0.32 | `gguf` | decoder (SmolLM2) | no \\| GGUF |" in tables.runtimes_refused()
