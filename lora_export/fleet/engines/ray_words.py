"""What Ray says of lost workers, in words for the report of a fleet."""

import re
from collections.abc import Mapping

from lora_export.contracts.fleet import RowOutcome, State, Task
from lora_export.errors import InputError, LoraExportError, RuntimeUnavailable, WorkerLost

_CAUSES = (
    (r"killed by `?ray\.kill", "it was ended by another program of the cluster"),
    (r"OutOfMemory|low on memory|memory monitor", "Ray ended it because its node had too little memory"),
    (r"node .*(died|dead|terminated|unexpectedly)|NODE_DIED|raylet.*(died|dead)|local raylet", "its node was lost"),
    (r"owner.*(died|dead)|OWNER_DIED", "the driver's connection to the cluster was lost"),
    (r"connection error code 2|End of file", "its process ended without a word (a signal, or out of memory)"),
    (r"exit code (-?\d+)", r"its process ended with exit status \1"),
    (r"unavailable", "its node does not answer"),
)  # fmt: skip


def how(error: BaseException) -> str:
    """How a worker ended."""
    text = str(error)
    for pattern, words in _CAUSES:
        if found := re.search(pattern, text, re.IGNORECASE):
            return found.expand(words)
    return f"Ray lost it: {first_line(error)}"


def first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def lost(task: Task, state: State, found: str, seconds: float, worker: str) -> RowOutcome:
    """Of a task whose worker died, or was ended."""
    planned = task.planned
    base = task.kind == "base"
    return RowOutcome(
        planned.row.base if base else planned.row.name,
        planned.base_key if base else planned.key,
        state,
        kind=task.kind,
        seconds=seconds,
        error=WorkerLost(found).as_json(),
        worker=worker,
    )


def no_worker(error: BaseException | None) -> LoraExportError:
    """Why a worker could not begin."""
    if "No module named 'lora_export'" in str(error):
        return RuntimeUnavailable(
            "lora-export is not installed on a node of the Ray cluster",
            next_step="pip install 'lora-export[fleet]' there, or start the nodes from the driver's image",
        )
    return RuntimeUnavailable(
        f"the Ray cluster cannot start a worker: {how(error) if error else 'no reason is known'}",
        next_step="the logs of Ray on the node (session_latest/logs); the same command goes on with what is left",
    )


def no_room(threads: int, seconds: float) -> LoraExportError:
    wanted = f"{threads} free cores" if threads else "a free GPU"
    return RuntimeUnavailable(
        f"the Ray cluster has had no room for a worker for {seconds:.0f} s",
        expected=f"a node with {wanted}",
        next_step="`ray status` on the cluster says what is in use; the same command goes on later",
    )


def unseen(node: str, places: tuple[str, ...]) -> LoraExportError:
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return InputError(
        f"node {node} does not see {places[0]}{more}",
        expected="bases, adapters and texts on a disk that all nodes share, on the Hub or in an object store",
    )


def other_root(node: str, why: str, root: str) -> LoraExportError:
    return InputError(
        f"node {node} does not see the root of the fleet: {why}",
        where=root,
        expected="a folder on a disk that all nodes share, at the same path, or the URL of an object store",
    )


def other_versions(node: str, there: Mapping[str, str], here: Mapping[str, str]) -> LoraExportError | None:
    """None if they are the same."""
    other = [
        f"{name} {there.get(name, 'missing')} (driver: {here.get(name, 'missing')})"
        for name in sorted(here.keys() | there.keys())
        if there.get(name) != here.get(name)
    ]
    if not other:
        return None
    return RuntimeUnavailable(
        f"node {node} has other versions than the driver: {', '.join(other)}",
        expected="the same everywhere: keys of objects are made of versions",
        next_step="start the nodes from the driver's image or environment",
    )
