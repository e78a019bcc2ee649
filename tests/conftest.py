"""Tests never talk to the hub; the switches are set before anything imports a library that reads them."""

import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["LORA_EXPORT_NO_CACHE"] = "1"  # a run that is tested computes everything
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core, so one thread a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import pytest

MEASURED = any(name.startswith("COVERAGE_PROCESS") for name in os.environ)  # coverage is
DEAR = ("packages", "end_to_end", "onnx_export", "validation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders that take long come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: DEAR.index(item.path.parent.name) if item.path.parent.name in DEAR else len(DEAR))


def pytest_collection_finish() -> None:
    """Nothing that was imported is looked at again by the collector of garbage."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Engines' processes of quick tests are forked from one that has imported what they import."""
    isolated = sys.modules.get("lora_export.onnx_export.engines.isolated")
    if isolated is not None and sys.platform == "linux" and not MEASURED:
        from tests import warm_engines

        slow = item.get_closest_marker("slow")
        isolated._start = warm_engines.STARTED if slow else warm_engines.FRONT.start


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file goes to one worker, as it shares what it made; so do all of packages, which share runs."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "packages" if "/packages/" in file else file

    return Together(config, log)


def pytest_configure() -> None:
    """While coverage is measured, engines' processes are measured, too: they get a clean environment otherwise."""
    gc.disable()  # until all is imported
    if MEASURED:
        from lora_export.onnx_export.engines import isolated

        isolated._KEPT_PREFIXES = (*isolated._KEPT_PREFIXES, "COVERAGE_PROCESS")


def pytest_sessionfinish() -> None:
    """xdist kills a worker that takes long to end, and all that coverage counted in it would be lost."""
    if "PYTEST_XDIST_WORKER" in os.environ and MEASURED:
        from coverage import Coverage

        if (measuring := Coverage.current()) is not None:
            measuring.save()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """played(**faults) makes the CPU play CUDA and TensorRT, in this process and in those that it starts.

    The probe of providers, a process of some seconds, is not asked."""
    from lora_export import runtime
    from lora_export.onnx_export.engines import isolated
    from tests.stand_in import played as stand_in

    def play(**faults: Any) -> None:
        stand_in.install(stand_in.Faults(**faults), monkeypatch.setattr)
        for name, value in stand_in.variables(faults).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(isolated, "_environment", stand_in.with_stand_in(isolated._environment))
        monkeypatch.setattr(runtime, "why_not", lambda provider: None)

    return play
