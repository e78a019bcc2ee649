"""Engines' processes, as users start them and as the quick tests do."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_export.errors import AdapterError, ExportError
from lora_export.onnx_export.engines import isolated
from tests import warm_engines


@pytest.fixture(params=["started", "forked"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[isolated.Worker]:
    start = warm_engines.STARTED if request.param == "started" else warm_engines.FRONT.start
    monkeypatch.setattr(isolated, "_start", start)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with isolated.Worker() as worker:
        yield worker


def told(worker: isolated.Worker, to: Path) -> dict[str, Any]:
    worker.run("tests.onnx_export.told", {"do": "tell", "to": str(to)}, engine="tiny")
    said: dict[str, Any] = json.loads(to.read_text())
    return said


def test_worker_has_one_process_with_folder_and_environment_of_its_own(
    worker: isolated.Worker, tmp_path: Path
) -> None:
    first, second = told(worker, tmp_path / "first"), told(worker, tmp_path / "second")
    assert first == second and first["pid"] != os.getpid()
    folder = Path(first["folder"])
    assert folder.name.startswith("lora-export-") and (folder / "log.txt").is_file()
    environment = first["environment"]
    assert "HF_TOKEN" not in environment and environment["HF_HOME"].startswith(first["folder"])
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["PATH"] == os.environ["PATH"]
    worker.close()
    assert not psutil.pid_exists(first["pid"]) and not folder.exists()


def test_worker_refusal_arrives_and_the_process_goes_on(worker: isolated.Worker, tmp_path: Path) -> None:
    first = told(worker, tmp_path / "first")
    with pytest.raises(AdapterError, match="not this adapter"):
        worker.run("tests.onnx_export.told", {"do": "refuse"}, engine="tiny")
    assert told(worker, tmp_path / "second") == first


@pytest.mark.parametrize(
    ("do", "status", "line"), [("fail", 1, "KeyError: 'no such weight'"), ("die", -9, "printed by")]
)
def test_worker_failure_has_status_and_last_lines(
    worker: isolated.Worker, tmp_path: Path, do: str, status: int, line: str
) -> None:
    first = told(worker, tmp_path / "first")
    with pytest.raises(ExportError) as failure:
        worker.run("tests.onnx_export.told", {"do": do}, engine="tiny")
    assert f"the engine tiny failed (status {status})" in str(failure.value)
    assert (line in str(failure.value)) == (do == "fail")  # what was not written when it died is lost
    assert "Traceback" not in str(failure.value)
    assert told(worker, tmp_path / "second")["pid"] != first["pid"]
