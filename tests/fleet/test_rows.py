"""A row in a worker: what it keeps, what it takes from its base, and what becomes of one that cannot be done."""

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.contracts import RowOutcome, Source, StoryOptions
from lora_export.contracts.fleet import PlannedRow
from lora_export.errors import OutputError
from lora_export.fleet.stores.folder import FolderStore
from lora_export.records import decoded
from lora_export.storage.sealed import hashed
from lora_export.workflows.fleet import prepared
from tests.fleet.making import carry_out, node, options, planned, with_short_texts
from tests.validation.conftest import save_adapter, save_base


class Inputs:
    """A base, and where a fleet works."""

    def __init__(self, folder: Path, how: StoryOptions) -> None:
        self.folder, self.root, self.scratch = folder, folder / "ROOT", folder / "scratch"
        self.how = how
        self.base = save_base(folder / "base", torch.float32)

    def alone(self, adapter: Path) -> PlannedRow:
        """A row that shares nothing, so that its base needs no preparation."""
        return replace(planned(self.base, adapter, self.how), base_key="", alone="as a test")


class Fleet(Inputs):
    """With the base prepared, and two adapters of it."""

    def __init__(self, folder: Path, how: StoryOptions) -> None:
        super().__init__(folder, how)
        self.adapters = [save_adapter(self.base, folder / f"adapter-{i}", seed=1 + i) for i in range(2)]
        self.how = with_short_texts(how, folder)
        self.prepared = carry_out("base", self.planned(0), self.root, self.scratch)

    def planned(self, which: int, **row: Any) -> PlannedRow:
        return planned(self.base, self.adapters[which], self.how, **row)

    def row(self, which: int, root: Path | None = None, **row: Any) -> RowOutcome:
        return carry_out("row", self.planned(which, **row), root or self.root, self.scratch)

    def other(self, name: str) -> Path:
        """Another root with the same preparation."""
        root = self.folder / name
        place = f"bases/{self.prepared.key}"
        FolderStore(self.root).fetch(place, self.folder / "copy")
        record = decoded((self.root / place / "record.json").read_bytes(), "")
        assert FolderStore(root).publish(self.folder / "copy", place, record)
        return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), options())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with node(folder / "scratch"):
        yield Fleet(folder, options())


@pytest.fixture(scope="module")
def done(fleet: Fleet) -> RowOutcome:
    return fleet.row(1)


def poisoned(inputs: Inputs, folder: Path) -> Path:
    """An adapter with NaN in it."""
    adapter = save_adapter(inputs.base, folder / "poisoned", seed=77)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, adapter / "adapter_model.safetensors")
    return adapter


def of(fleet: Fleet, outcome: RowOutcome) -> Path:
    return fleet.root / outcome.place


@pytest.mark.slow
def test_prepare_base_keeps_export_answers_and_measurement(fleet: Fleet) -> None:
    assert fleet.prepared.state == "done", fleet.prepared.error
    folder = of(fleet, fleet.prepared)
    assert {p.name for p in folder.iterdir()} >= {"onnx", "benchmark", "record.json"}
    record = decoded((folder / "record.json").read_bytes(), "")
    assert "with the adapter adapter-0" in record.claim and record.key == fleet.prepared.key
    assert carry_out("base", fleet.planned(0), fleet.root, fleet.scratch).state == "skipped"


@pytest.mark.slow
def test_row_of_a_shared_base_is_a_whole_run_with_its_record(fleet: Fleet, done: RowOutcome) -> None:
    assert done.state == "done", done.error
    folder = of(fleet, done)
    assert {p.name for p in folder.iterdir()} == {"merged", "onnx", "report", "manifest.json", "record.json"}
    record = decoded((folder / "record.json").read_bytes(), "")
    there = {p.relative_to(folder).as_posix(): hashed(p) for p in folder.rglob("*") if p.is_file()}
    del there["record.json"]
    assert {n: (f.bytes, f.sha256) for n, f in record.files.items()} == {
        n: (f.size, f.sha256) for n, f in there.items()
    }
    assert record.outcome.figures == done.figures and record.base_key == fleet.prepared.key
    assert done.figures.survival is not None and 0.5 < done.figures.survival < 1.1
    assert done.figures.checks > 10 and done.figures.failed == 0 and done.figures.nbytes
    assert (fleet.root / done.report).is_file() and done.memory_bytes > 10**8
    again = fleet.row(1)
    assert (again.state, again.figures, again.place, again.report) == (
        "skipped", done.figures, done.place, done.report,
    )  # fmt: skip


@pytest.mark.slow
def test_row_of_a_shared_base_says_what_was_measured(fleet: Fleet, done: RowOutcome) -> None:
    folder = of(fleet, done)
    report = json.loads((folder / "report" / "report.json").read_text())
    digest = hashed(folder / "onnx" / "model.onnx").sha256
    notes = [n for n in report["benchmark"]["notes"] if "measured once for this graph" in n]
    assert len(notes) == 1 and digest in notes[0] and "with the adapter adapter-0" in notes[0]
    base = json.loads((of(fleet, fleet.prepared) / "benchmark" / "report.json").read_text())
    assert report["benchmark"]["cells"] == base["benchmark"]["cells"]
    assert report["validate"]["seed"] == int(fleet.prepared.key[:8], 16) % 2**31


@pytest.mark.slow
def test_row_starts_no_process_of_an_engine(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.onnx_export.engines.isolated import Worker

    monkeypatch.setattr(Worker, "__enter__", lambda self: pytest.fail("an engine was started"))
    outcome = fleet.row(0)
    assert outcome.state == "done", outcome.error


@pytest.mark.slow
def test_row_that_asks_for_another_measurement_is_measured_itself(fleet: Fleet) -> None:
    how = replace(fleet.how, benchmark=replace(fleet.how.benchmark, shapes=((1, 4),)))
    one = planned(fleet.base, fleet.adapters[1], how)
    assert one.base_key == fleet.prepared.key
    outcome = carry_out("row", one, fleet.root, fleet.scratch)
    report = json.loads((of(fleet, outcome) / "report" / "report.json").read_text())
    assert {c["prompt"] for c in report["benchmark"]["cells"]} == {4}
    assert not [n for n in report["benchmark"]["notes"] if "measured once" in n]
    assert list(report["benchmark"]["cells"][0]["arms"]) == ["base", "merged", "unmerged"]


@pytest.mark.slow
def test_row_with_the_same_key_has_the_same_bytes(fleet: Fleet, done: RowOutcome) -> None:
    root = fleet.other("other")
    again = fleet.row(1, root)
    assert again.state == "done", again.error
    names = {p.relative_to(of(fleet, done)).as_posix() for p in of(fleet, done).rglob("*") if p.is_file()}
    differing = {n for n in names if (root / again.place / n).read_bytes() != (of(fleet, done) / n).read_bytes()}
    # Times: of the export, of the stages, of the report; and the documents that hold their hashes.
    assert differing <= {
        "onnx/export.json", "report/report.json", "report/report.html", "report/report.md", "manifest.json",
        "record.json",
    }  # fmt: skip
    one, two = (
        json.loads((r / "report" / "report.json").read_text()) for r in (of(fleet, done), root / again.place)
    )
    assert one["validate"] == two["validate"] and one["benchmark"] == two["benchmark"]
    assert one["merge"]["records"] == two["merge"]["records"]


def test_row_whose_adapter_is_damaged_is_refused_and_stops_no_other(inputs: Inputs, tmp_path: Path) -> None:
    one = inputs.alone(poisoned(inputs, tmp_path))
    outcome = carry_out("row", one, inputs.root, inputs.scratch)
    assert outcome.state == "refused" and outcome.error is not None and "NaN" in str(outcome.error["found"])
    record = decoded((inputs.root / "failed" / one.key / "record.json").read_bytes(), "")
    assert record.outcome.error == outcome.error and not record.files
    assert str(inputs.scratch) not in json.dumps(outcome.error)
    assert not (inputs.root / "objects" / one.key).exists()
    # Tried again, the verdict takes the place of the earlier one.
    assert carry_out("row", one, inputs.root, inputs.scratch).state == "refused"


@pytest.mark.slow
def test_row_whose_base_was_slower_fails_the_gate_and_keeps_the_evidence(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = prepared.OpenedBase.shared

    def slower(self: prepared.OpenedBase, how: StoryOptions) -> Any:
        shared = taken(self, how)
        assert shared.measured is not None
        return replace(shared, measured=replace(shared.measured, verdict="slower"))

    monkeypatch.setattr(prepared.OpenedBase, "shared", slower)
    adapter = save_adapter(fleet.base, tmp_path / "slow", seed=78)
    outcome = carry_out("row", planned(fleet.base, adapter, fleet.how), fleet.root, fleet.scratch)
    assert outcome.state == "gate" and outcome.error is not None
    folder = fleet.root / outcome.place
    assert folder.parent.name == "failed" and (fleet.root / outcome.report).is_file()
    assert {p.name for p in folder.iterdir()} == {
        "FAILED",
        "merged",
        "onnx",
        "report",
        "manifest.json",
        "record.json",
    }
    assert str(fleet.scratch) not in json.dumps(outcome.error)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        OutputError("the store is full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_row_that_a_machine_could_not_do_is_no_verdict(
    error: Exception, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lora_export.pipeline

    def fails(*args: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(lora_export.pipeline, "merge_and_export", fails)
    adapter = save_adapter(inputs.base, tmp_path / "adapter", seed=79)
    one = inputs.alone(adapter)
    outcome = carry_out("row", one, inputs.root, inputs.scratch)
    assert outcome.state == "died" and outcome.error is not None and outcome.error["found"]
    assert not (inputs.root / "failed" / one.key).exists() and not (inputs.root / "objects" / one.key).exists()


def test_row_whose_input_changed_since_the_plan_keeps_nothing(inputs: Inputs, tmp_path: Path) -> None:
    adapter = save_adapter(inputs.base, tmp_path / "adapter", seed=80)
    one = inputs.alone(adapter)
    save_adapter(inputs.base, adapter, seed=81)
    outcome = carry_out("row", one, inputs.root, inputs.scratch)
    assert outcome.state == "died" and "another one" in str((outcome.error or {})["found"])
    assert not (inputs.root / "objects" / one.key).exists()


@pytest.mark.slow
def test_opened_base_that_was_changed_in_the_store_is_refused(fleet: Fleet) -> None:
    root = fleet.other("changed")
    file = root / "bases" / fleet.prepared.key / "onnx" / "model.onnx"
    file.write_bytes(file.read_bytes() + b" ")
    with node(fleet.folder / "elsewhere") as scratch:
        outcome = carry_out("row", fleet.planned(1), root, scratch)
    assert outcome.state == "died" and "changed" in str((outcome.error or {})["found"])


@pytest.mark.slow
def test_row_that_keeps_its_package_keeps_report_and_certificate(fleet: Fleet) -> None:
    outcome = fleet.row(1, target="genai", keep="package")
    assert outcome.state == "done", outcome.error
    folder = of(fleet, outcome)
    assert {p.name for p in folder.iterdir()} == {
        "package", "report", "lora_export_certificate.json", "record.json",
    }  # fmt: skip
    assert (folder / "package" / "manifest.json").is_file()


def test_prepare_base_with_a_damaged_adapter_is_refused_before_any_export(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lora_export.onnx_export

    monkeypatch.setattr(lora_export.onnx_export, "export", lambda *a, **k: pytest.fail("the base was exported"))
    one = planned(inputs.base, poisoned(inputs, tmp_path), inputs.how)
    outcome = carry_out("base", one, inputs.root, inputs.scratch)
    assert outcome.state == "refused" and "NaN" in str((outcome.error or {})["found"])
    assert not (inputs.root / "bases" / one.base_key).exists()


def test_manifest_of_many_runs_hashes_a_base_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_export import manifest
    from lora_export.storage import sealed

    read: list[Path] = []

    def counted(path: Path, root: Path | None = None) -> Any:
        read.append(path)
        return hashed(path, root)

    monkeypatch.setattr(sealed, "hashed", counted)
    monkeypatch.setattr(sealed, "SETTLED", -1)
    monkeypatch.setattr(sealed, "_known", {})
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = manifest._input_hashes(tmp_path, sealed.hashed_once)
    assert manifest._input_hashes(tmp_path, sealed.hashed_once) == first and len(read) == 1
    file.write_bytes(b"two")
    assert manifest._input_hashes(tmp_path, sealed.hashed_once) != first and len(read) == 2
    # A verification reads what is there.
    assert not manifest.same_inputs("base_files", first, tmp_path)[0].passed


def test_verify_of_a_run_that_a_fleet_keeps_passes_over_its_record_and_package(tmp_path: Path) -> None:
    from lora_export import manifest

    run, base = tmp_path / "run", tmp_path / "base"
    for folder in (run / "merged", run / "package", base):
        folder.mkdir(parents=True)
    (run / "merged" / "config.json").write_text("{}")
    manifest.write(run, Source("base", base), [], {"merge": {}})
    found, _ = manifest.verify(run, None, [])
    assert all(f.passed for f in found)
    (run / "package" / "README.md").write_text("a package")
    assert not all(f.passed for f in manifest.verify(run, None, [])[0])  # nobody knows what it is
    (run / "record.json").write_text("{}")
    assert all(f.passed for f in manifest.verify(run, None, [])[0])
    (run / "other.json").write_text("{}")
    assert not all(f.passed for f in manifest.verify(run, None, [])[0])
