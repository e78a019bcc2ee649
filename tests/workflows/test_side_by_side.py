"""A run whose exports are made beside it: the same bytes as one after the other, and a clean end whatever fails."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lora_export import pipeline, validation
from lora_export.checkpoint.sources import adapter_choices, resolve
from lora_export.contracts import Progress, Story, StoryOptions
from lora_export.errors import ExportError, InputError
from lora_export.onnx_export.engines import isolated
from lora_export.progress import Silent
from lora_export.workflows.run_exports import Run
from tests import warm_engines
from tests.failures.commands import everything
from tests.onnx_export.test_warm_worker import REQUESTS, until
from tests.validation.conftest import save_adapter, save_base

OPTIONS = StoryOptions()
OPTIONS = replace(
    OPTIONS,
    export=replace(OPTIONS.export, provider="cpu"),
    validation=replace(OPTIONS.validation, seed=5),
    benchmark=replace(OPTIONS.benchmark, max_seconds=3.0, margin=0.9, shapes=((1, 8),)),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("side-by-side")
    base = save_base(root / "base", torch.float32)
    return base, save_adapter(base, root / "adapter")


@pytest.fixture
def run(inputs: tuple[Path, Path], tmp_path: Path) -> Callable[..., Story]:
    def merge_and_export(name: str = "out", progress: Progress | None = None, **how: bool) -> Story:
        base, adapter = resolve(str(inputs[0])), adapter_choices(inputs[1])
        told = progress or Silent()
        return pipeline.merge_and_export(base, adapter, tmp_path / name, OPTIONS, told, **how)

    return merge_and_export


class Busy:
    """In the place of the exports: a request of a minute in the engines' process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.begun, self.pid = folder / "begun", 0
        monkeypatch.setattr(pipeline, "WARM", ())
        monkeypatch.setattr(isolated, "_start", warm_engines.STARTED)
        monkeypatch.setattr(pipeline, "fits", lambda *_: True)
        monkeypatch.setattr(pipeline, "export_both", self)

    def __call__(self, run: Run, merged: object, progress: Progress) -> Any:
        run.worker.warm()
        assert run.worker._process is not None
        self.pid = run.worker._process.pid
        run.worker.run(REQUESTS, {"begun": str(self.begun), "seconds": 60}, engine="none")

    def meanwhile(self, action: Callable[[], None]) -> Callable[..., None]:
        """In the place of the validation: an action while the request runs."""

        def validate(*_: object, **__: object) -> None:
            until(self.begun)
            action()

        return validate


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("a text cannot be read")])
def test_end_of_validation_ends_the_export_and_leaves_nothing(
    run: Callable[..., Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    busy = Busy(monkeypatch, tmp_path)
    monkeypatch.setattr(validation, "validate", busy.meanwhile(fail))
    with pytest.raises(type(error)) as told:
        run()
    assert told.value is error
    assert not psutil.pid_exists(busy.pid) and list(everything(tmp_path)) == ["begun"]


def test_export_process_killed_is_told_and_leaves_nothing(
    run: Callable[..., Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(monkeypatch, tmp_path)
    killed = busy.meanwhile(lambda: psutil.Process(busy.pid).kill())

    def validate(*_: object, exports: Any, **__: object) -> None:
        killed()
        exports[0]

    monkeypatch.setattr(validation, "validate", validate)
    with pytest.raises(ExportError, match="status -9"):
        run()
    assert list(everything(tmp_path)) == ["begun"]


def test_refused_run_does_not_wait_for_imports(
    run: Callable[..., Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, started = {p.pid for p in psutil.Process().children()}, list[int]()

    def refuse(*_: object, **__: object) -> None:
        started.extend(p.pid for p in psutil.Process().children() if p.pid not in before)
        raise InputError("no")

    monkeypatch.setattr(pipeline, "WARM", ("tests.onnx_export.slow_import",))
    monkeypatch.setattr(isolated, "_start", warm_engines.STARTED)
    monkeypatch.setattr(pipeline, "_preflight", refuse)
    with pytest.raises(InputError):
        run()
    assert started and not any(psutil.pid_exists(pid) for pid in started)


@pytest.mark.slow
def test_run_side_by_side_leaves_the_bytes_of_one_after_the_other(
    run: Callable[..., Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "fits", lambda *_: True)
    run("both")
    run("one", side_by_side=False)
    both, one = everything(tmp_path / "both"), everything(tmp_path / "one")
    differing = {name for name in both.keys() | one.keys() if both.get(name) != one.get(name)}
    kept = {"manifest.json", "onnx/export.json"}  # with times
    assert {n for n in differing if not n.startswith("report/")} == kept
    first, second = (json.loads((tmp_path / n / "report/report.json").read_text()) for n in ("both", "one"))
    assert first["validate"] == second["validate"]
    for export in (first["export"], second["export"]):
        export["seconds"] = export["proof"]["seconds"] = 0
    assert first["export"] == second["export"]
