"""Tests never talk to the hub; the switches are set before anything imports a library that reads them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core, so one thread a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

DEAR = ("packages", "end_to_end", "onnx_export", "validation")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file goes to one worker, as it shares what it made; so do all tests of packages,
    which share runs. Folders that take long come first, so that no worker is left with one at the end."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "packages" else item.path.as_posix()))
    items.sort(key=lambda item: DEAR.index(item.path.parent.name) if item.path.parent.name in DEAR else len(DEAR))
