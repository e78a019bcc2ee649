"""Work of rows on a cluster: what a worker sees, and objects that are written to a root, quickly or slowly."""

import os
import time
from pathlib import Path

from lora_export.contracts.fleet import FleetRow, PlannedRow, Record, RowOutcome, Task
from lora_export.fleet.stores.protocol import opened
from lora_export.version import __version__

PARTS = 5  # files of an object


def task(name: str, scratch: Path, root: Path | str = "", base_key: str = "") -> Task:
    planned = PlannedRow(FleetRow(name, "tiny", "tiny", ("adapter",)), f"key-of-{name}", base_key)
    return Task("row", planned, str(root), scratch)


def tell(given: Task) -> RowOutcome:
    """Named show-VARIABLE, cores, folder or sleep-SECONDS: what the worker sees is its name in the outcome."""
    name = given.planned.row.name
    deed, _, how = name.partition("-")
    seen = {
        "show": lambda: os.environ.get(how, "nothing"),
        "cores": lambda: ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "folder": os.getcwd,
        "sleep": lambda: str(time.sleep(float(how or 0))),
    }[deed]()
    return RowOutcome(name, given.planned.key, "done", worker=seen)


def write(given: Task) -> RowOutcome:
    """An object of several files, all of which tell which attempt wrote them, published as real rows publish."""
    name, key = given.planned.row.name, given.planned.key
    place, store = f"objects/{key}", opened(given.root)
    outcome = RowOutcome(name, key, "done", place=place)
    if store.read(f"{place}/record.json") is not None:
        return RowOutcome(name, key, "skipped", place=place)
    attempt = f"{os.getpid()}-{time.monotonic_ns()}".encode()
    folder = given.scratch / "object"
    for number in range(PARTS):
        (folder / f"part{number}").mkdir(parents=True)
        (folder / f"part{number}" / "bytes").write_bytes(attempt * 2000)
        time.sleep(0.02)
    record = Record(1, key, {}, outcome, {}, tool_version=__version__)
    if not store.publish(folder, place, record):
        return RowOutcome(name, key, "skipped", place=place)
    return outcome


def compute(given: Task) -> RowOutcome:
    """A row that takes two seconds of a processor."""
    begun = time.process_time()
    number = 1
    while time.process_time() - begun < 2.0:
        number = number * 3 % 1_000_003
    return RowOutcome(given.planned.row.name, given.planned.key, "done")
