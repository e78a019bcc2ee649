"""A fleet from its jobs file to its report, with work that is made up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.contracts import FleetOptions, FleetResult, FleetRow, PlannedRow
from lora_export.errors import InputError
from lora_export.workflows.fleet import fleet as joined
from tests.builders import handmade_adapter, llama_config, save_base
from tests.fleet import fakes
from tests.fleet.driving import REPOSITORY
from tests.fleet.test_driver import Said

AGAIN = """
import json, sys
from lora_export.api import fleet
from lora_export.contracts import FleetOptions
from lora_export.progress import Silent
from pathlib import Path
result = fleet(sys.argv[1], sys.argv[2], FleetOptions(scratch=Path(sys.argv[3])))
heavy = {"torch", "transformers", "onnxruntime", "onnx", "peft", "pebble", "ray"}
heavy = (heavy | {"lora_export.fleet.engines.local"}) & set(sys.modules)
print(json.dumps([result.totals, sorted(heavy)]))
"""


@pytest.fixture(autouse=True)
def made_up_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(joined, "WORK", fakes.WORK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters by what happens to them."""
    place = tmp_path_factory.mktemp("inputs")
    save_base(place / "base", config=llama_config(num_hidden_layers=1))
    for number, name in enumerate(("ok-1", "ok-2", "segv"), start=1):
        update = {"model.layers.0.self_attn.q_proj": (torch.full((6, 48), float(number)), torch.ones(48, 6))}
        handmade_adapter(place / "adapters" / name, update)
    return place


def run(inputs: Path, tmp_path: Path, glob: str, said: Said | None = None, **options: Any) -> FleetResult:
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        f'[base.b]\nmodel = "{inputs}/base"\n[[adapters]]\nbase = "b"\nglob = "{inputs}/adapters/{glob}"\n'
    )
    given = FleetOptions(workers=1, retries=0, scratch=tmp_path / "scratch", **options)
    return joined.fleet(jobs, str(tmp_path / "root"), given, said or Said())


def test_fleet_of_three_of_which_one_dies_is_told_named_and_reported(inputs: Path, tmp_path: Path) -> None:
    said = Said()
    result = run(inputs, tmp_path, "*", said)
    assert [(r.name, r.state) for r in result.rows] == [("ok-1", "done"), ("ok-2", "done"), ("segv", "died")]
    assert result.exit_code == 1 and [b.state for b in result.bases] == ["done"]
    assert {p.stem for p in (tmp_path / "root/names").iterdir()} == {"ok-1", "ok-2"}
    report = json.loads((tmp_path / "root/fleet.json").read_bytes())
    assert [r["state"] for r in report["rows"]] == ["done", "done", "died"]
    assert any(line.startswith("warning: segv: died: the worker ended by signal 11") for line in said.lines)
    assert not list((tmp_path / "scratch").iterdir())


def test_fleet_that_is_done_starts_nothing_and_writes_nothing(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path, "ok-*")
    root = tmp_path / "root"
    before = {p: p.lstat() for p in root.rglob("*")}
    words = [sys.executable, "-c", AGAIN, str(tmp_path / "jobs.toml"), str(root), str(tmp_path / "scratch")]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run(words, capture_output=True, text=True, check=True, env=variables).stdout
    totals, heavy = json.loads(out)
    assert (totals["skipped"], totals["done"], heavy) == (2, 0, [])
    after = {p: p.lstat() for p in root.rglob("*")}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


def test_fleet_name_that_leads_elsewhere_is_mended(inputs: Path, tmp_path: Path) -> None:
    result = run(inputs, tmp_path, "ok-1")
    name = tmp_path / "root/names/ok-1.json"
    name.write_text('{"key": "other"}')
    run(inputs, tmp_path, "ok-1")
    assert json.loads(name.read_bytes())["key"] == result.rows[0].key


def test_fleet_interrupted_says_how_to_go_on(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()

    def interrupt(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(joined, "drive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path, "ok-1", said)
    assert "the same command goes on" in said.lines[-1]


@pytest.mark.parametrize("on", ["here", "raylet", "Ray"])
def test_fleet_engine_that_is_none_is_refused_first(tmp_path: Path, on: str) -> None:
    with pytest.raises(InputError, match="--on"):
        run(tmp_path, tmp_path, "*", on=on)
    assert not (tmp_path / "root").exists()


def test_local_inputs_are_bases_and_adapters_of_this_machine(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "a"
    for folder in (base, adapter):
        folder.mkdir()
    rows = [
        PlannedRow(FleetRow("1", "b", str(base), (f"{adapter}:0.5", "s3://bucket/a")), "k"),
        PlannedRow(FleetRow("2", "b", "owner/name@main", (str(adapter),)), "l"),
    ]
    assert joined.local_inputs(rows) == (adapter, base)
