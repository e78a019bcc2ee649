"""What a finished run leaves: manifest.json, report.json and samples.json, read again by `inspect` and `report`."""

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  - reads its cache, which lies elsewhere
from hypothesis import strategies as st

from lora_export.errors import LoraExportError
from lora_export.report import compare, load, load_samples, render
from lora_export.workflows.inspection import inspect_folder
from tests.fuzz.guard import attempt, harness
from tests.fuzz.strategies import json_files
from tests.report.conftest import full_report, raw_timings

MANIFEST = {
    "schema_version": 1,
    "tool": {"name": "lora-export", "version": "1"},
    "versions": {"torch": "2"},
    "base": {"name": "example/base", "commit": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", "files": {}},
    "adapters": [{"name": "adapter", "commit": None, "weight": 0.7, "files": {}}],
    "options": {"precision": "fp32", "merge": {}},
    "files": {
        "merged/config.json": {"sha256": "ab", "size": 700},
        "onnx/model.onnx": {"sha256": "cd", "size": 170_928},
    },
}


def small_report() -> dict[str, Any]:
    report = full_report()
    report["merge"]["records"] = [*report["merge"]["records"][:3], report["merge"]["records"][-1]]
    report["validate"]["kl_by_position"] = [1e-5, 2e-5, 0.0]
    whole: dict[str, Any] = json.loads(json.dumps(report))
    return whole


REPORT = small_report()
SAMPLES = {cell: {arm: list(times[:5]) for arm, times in arms.items()} for cell, arms in raw_timings().items()}
FIELDS = (
    *REPORT, *REPORT["merge"], *REPORT["merge"]["records"][0], *REPORT["validate"], *REPORT["export"],
    *REPORT["benchmark"], *REPORT["benchmark"]["cells"][0], "margin", "name", "note", "used", "total", "updated",
)  # fmt: skip


def write_run(folder: Path, manifest: bytes, report: bytes, samples: bytes) -> None:
    (folder / "merged").mkdir()
    (folder / "report").mkdir()
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "report" / "report.json").write_bytes(report)
    (folder / "report" / "samples.json").write_bytes(samples)


@harness(
    120,
    manifest=json_files(MANIFEST, (*MANIFEST, "size", "name", "precision")),
    report=st.just(json.dumps(REPORT).encode()) | json_files(REPORT, FIELDS),
)
def test_inspected_run(manifest: bytes, report: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, manifest, report, b"{}")
        described = attempt(folder, lambda: inspect_folder(folder))
        if not isinstance(described, LoraExportError):
            json.dumps(described, ensure_ascii=False).encode()
            assert described["kind"] == "run"


@harness(
    25,
    report=json_files(REPORT, FIELDS),
    samples=st.just(json.dumps(SAMPLES).encode()) | json_files(SAMPLES, ("base", "merged", *SAMPLES)),
)
def test_report_pages(report: bytes, samples: bytes) -> None:
    """A report that is accepted can be written as pages, with its plots, and set beside another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, b"{}", report, samples)
        inner = folder / "report"
        accepted = [attempt(folder, lambda: load(inner)), attempt(folder, lambda: load_samples(inner))]
        pages = attempt(folder, lambda: render(inner))
        both = attempt(folder, lambda: compare(inner, inner, folder / "both"))
        refused = any(isinstance(a, LoraExportError) for a in accepted)
        assert isinstance(pages, LoraExportError) == isinstance(both, LoraExportError) == refused
        if not refused:
            for page in (inner / "report.html", inner / "report.md", folder / "both" / "report.html"):
                assert page.read_text(encoding="utf-8")
