"""Workers on Ray: what is passed to them, what is refused, each way to be lost, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lora_export.contracts.fleet import RowOutcome
from lora_export.errors import RuntimeUnavailable, WorkerLost
from lora_export.fleet.engines import ray_cluster, ray_words
from lora_export.fleet.engines.ray import RayEngine, RaySlot, measures_on_gpu
from lora_export.fleet.engines.ray_worker import ROOT_ID, Meeting, RayWorker, own_cores, versions
from tests.fleet import deeds, fakes
from tests.fleet.cluster import gone, workers

SOON = 60.0


# --- without a cluster ---------------------------------------------------------------------------------------


def cluster_of(*cores: int, free: int | None = None) -> Any:
    nodes = [{"Alive": True, "Resources": {"CPU": float(n)}} for n in cores]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    return SimpleNamespace(nodes=lambda: nodes, available_resources=lambda: {"CPU": float(free or sum(cores))})


@pytest.mark.parametrize(
    ("cores", "free", "workers", "room"),
    [
        ((4, 4), None, None, (2, 4)),  # two cores each
        ((4, 4), 4, None, (2, 2)),  # others use the rest
        ((4, 1), None, None, (1, 5)),
        ((0, 3), None, None, (2, 1)),  # the head does no work
        ((4, 4), None, 2, (4, 2)),
        ((4, 4), None, 3, (2, 3)),  # not 8 // 3: no node has room for two of three cores beside another
        ((3, 1), None, 2, (1, 2)),  # not 4 // 2: only one node has two cores
        ((1, 1, 1), None, 3, (1, 3)),
    ],
)
def test_room_is_shared_out_within_nodes(
    cores: tuple[int, ...], free: int | None, workers: int | None, room: tuple[int, int]
) -> None:
    assert ray_cluster.room(cluster_of(*cores, free=free), workers) == room


def test_room_more_workers_than_cores_is_refused() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"--workers 4.* 3 cores"):
        ray_cluster.room(cluster_of(2, 1), 4)
    with pytest.raises(RuntimeUnavailable, match="no cores"):
        ray_cluster.room(cluster_of(0), None)


def test_variables_secrets_are_not_among_those_that_ray_logs() -> None:
    given = {
        "PYTHONPATH": f"code{os.pathsep}/other", "HF_HUB_OFFLINE": "1", "LORA_EXPORT_CACHE": "/c", "HOME": "/root",
        "LORA_EXPORT_STORE_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "r", "HF_TOKEN": "x",
        "GOOGLE_APPLICATION_CREDENTIALS": "x", "AZURE_STORAGE_ACCOUNT_KEY": "x",
    }  # fmt: skip
    logged = dict(ray_cluster.passed_variables(given))
    assert set(logged) == {"PYTHONPATH", "HF_HUB_OFFLINE", "LORA_EXPORT_CACHE"}
    assert logged["PYTHONPATH"] == f"{Path('code').absolute()}{os.pathsep}/other"
    secret = ray_cluster.secret_variables(given)
    assert set(secret) == set(given) - set(logged) - {"HOME"}
    assert "'x'" not in repr(Meeting(secret))


def test_ray_that_is_not_installed_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'lora-export\[fleet\]'"):
        RayEngine("ray", fakes.work).__enter__()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("The actor is dead because its process has died. connection error code 2. End of file.", "a signal"),
        ("Task was killed due to the node running low on memory.", "too little memory"),
        ("The actor is dead because its node has died. Node Id: 77", "node was lost"),
        ("The actor is dead because its owner has died. Owner Id: 77", "connection to the cluster"),
        ("The actor 77 is unavailable: RpcError", "does not answer"),
        ("\n something else\n", "Ray lost it: something else"),
    ],
)
def test_how_tells_what_became_of_a_worker(said: str, words: str) -> None:
    assert words in ray_words.how(RuntimeError(said))


def test_worker_of_other_versions_is_refused_by_name() -> None:
    here = versions()
    assert ray_words.other_versions("n", here, here) is None
    other = ray_words.other_versions("node-7", here | {"torch": "1.0"}, here)
    assert isinstance(other, RuntimeUnavailable) and "node-7" in str(other) and "torch 1.0 (driver: " in str(other)
    lacking = ray_words.other_versions("n", {k: v for k, v in here.items() if k != "onnxruntime"}, here)
    assert lacking is None or "missing" in str(lacking)


def begun(meeting: Meeting) -> Any:
    return RayWorker.begin(RayWorker.__new__(RayWorker), meeting)


def test_worker_that_sees_another_root_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    meeting = Meeting(root=str(tmp_path / "root"), token="mine", needed=(str(tmp_path), str(tmp_path / "base")))
    assert begun(meeting).root == "nothing of it is there"
    assert begun(meeting).missing == (str(tmp_path / "base"),)
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "root" / ROOT_ID).write_text("another's")
    assert begun(meeting).root == "another root is there"
    (tmp_path / "root" / ROOT_ID).write_text("mine")
    assert begun(meeting).root == ""
    assert {p.name for p in (tmp_path / "root").rglob("*") if p.is_file()} == {ROOT_ID}, "the trial is removed"


def test_worker_that_cannot_write_to_the_root_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.fleet.stores.folder import FolderStore

    (tmp_path / ROOT_ID).write_text("mine")

    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FolderStore, "create", full)
    assert "No space" in begun(Meeting(root=str(tmp_path), token="mine")).root


def test_worker_variables_do_not_replace_those_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "the node's")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    begun(Meeting({"AWS_REGION": "the driver's", "AWS_PROFILE": "the driver's"}))
    seen = os.environ["AWS_REGION"], os.environ.pop("AWS_PROFILE")
    assert seen == ("the node's", "the driver's")


def test_workers_of_a_node_share_out_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6, 8}, raising=False)
    assert [own_cores(2, place) for place in range(3)] == [(0, 2), (4, 6), ()]


def test_gpu_is_asked_for_by_measurements_alone(tmp_path: Path) -> None:
    row = fakes.planned("row", base_key="base")
    cuda = replace(row.row.options, export=replace(row.row.options.export, provider="cuda"))
    shared = replace(row, row=replace(row.row, options=cuda))
    task = deeds.task("show", tmp_path)
    assert measures_on_gpu(replace(task, kind="base", planned=shared))
    assert measures_on_gpu(replace(task, planned=replace(shared, base_key="")))
    assert not measures_on_gpu(replace(task, planned=shared)), "it takes over its base's measurement"
    assert not measures_on_gpu(replace(task, kind="base", planned=row))


@pytest.mark.parametrize("room", [True, False])
def test_gpu_measurement_has_a_worker_of_its_own_or_says_that_there_is_no_room(room: bool) -> None:
    asked, ended, greeted = list[int](), list[object](), list[object]()
    worker = SimpleNamespace(begun="begun")
    engine = SimpleNamespace(
        actor=lambda gpus: asked.append(gpus) or worker,
        ray=SimpleNamespace(wait=lambda waiting, timeout: (waiting if room else [], [])),
        end=ended.append,
        greet=greeted.append,
    )
    slot: Any = SimpleNamespace(_engine=engine)
    if room:
        assert RaySlot._with_gpu(slot, 3.0) is worker and greeted == [worker] and not ended
    else:
        with pytest.raises(RuntimeUnavailable, match="no room for a worker for 3 s") as refused:
            RaySlot._with_gpu(slot, 3.0)
        assert refused.value.expected == "a node with a free GPU" and ended == [worker]
    assert asked == [1]


def test_watcher_ends_what_a_killed_worker_started_and_removes_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "full").mkdir(parents=True)
    code = f"""
import os, pathlib, subprocess, sys, time
from lora_export.fleet.engines.orphans import Watcher
watcher = Watcher()
watcher.remove(pathlib.Path({str(folder)!r}))
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
pids = [subprocess.Popen(sleep, start_new_session=apart).pid for apart in (False, True)]
time.sleep(0.6)
print(*pids, flush=True)
time.sleep(300)
"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    started = [psutil.Process(int(pid)) for pid in worker.stdout.readline().split()]
    assert len(started) == 2 and folder.exists()
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    assert gone(started, 5)
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()


# --- Ray on this machine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No cluster but those of these tests; workers get the variables of their node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKES_PIDS", str(tmp_path_factory.mktemp("pids") / "pids"))
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def engine(alone: None, scratch: Path) -> Iterator[RayEngine]:
    with RayEngine("ray", fakes.work, workers=2) as engine:
        yield engine


def outcome(engine: RayEngine, task: Any, timeout: float = SOON, slot: int = 0) -> RowOutcome:
    return engine.slots[slot].submit(task, timeout).result(SOON + timeout)


def found(outcome: RowOutcome) -> str:
    return str((outcome.error or {})["found"])


@pytest.mark.slow
def test_ray_worker_that_dies_is_blamed_alone(engine: RayEngine, scratch: Path) -> None:
    for way in ("kill", "segv", "exit7", "exit0"):
        beside = engine.slots[1].submit(fakes.task("short", scratch), SOON)
        dead = outcome(engine, fakes.task(way, scratch))
        assert (dead.name, dead.state, dead.key) == (way, "died", f"{way}-key")
        assert "ended without a word" in found(dead) or "exit" in found(dead)
        assert beside.result(SOON).state == "done"
    assert outcome(engine, fakes.task("ok", scratch)).state == "done"


@pytest.mark.slow
def test_ray_task_too_long_is_ended_with_what_it_started(engine: RayEngine, scratch: Path) -> None:
    locked = outcome(engine, fakes.task("lock", scratch), timeout=0.5)
    assert locked.state == "timeout" and "0.5 s" in found(locked)
    assert outcome(engine, fakes.task("children", scratch), timeout=3).state == "timeout"
    children = Path(os.environ["FAKES_PIDS"]).read_text().split()
    assert len(children) == 2
    assert gone([psutil.Process(int(pid)) for pid in children if psutil.pid_exists(int(pid))], 10)


@pytest.mark.slow
def test_ray_exception_of_the_work_is_raised_in_words(engine: RayEngine, scratch: Path) -> None:
    for way in ("odd", "refuse"):
        with pytest.raises(WorkerLost, match=r"odd|no such adapter"):
            outcome(engine, fakes.task(way, scratch))


@pytest.mark.slow
def test_ray_worker_is_kept_until_renewed(engine: RayEngine, scratch: Path) -> None:
    pids = {outcome(engine, fakes.task("ok", scratch)).worker for _ in range(3)}
    engine.slots[0].renew()
    after = outcome(engine, fakes.task("ok", scratch)).worker
    assert len(pids) == 1 and after not in pids


@pytest.mark.slow
def test_ray_says_nothing_to_the_terminal(
    engine: RayEngine, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome(engine, fakes.task("noise", scratch))
    outcome(engine, fakes.task("segv", scratch))
    outcome(engine, fakes.task("ok", scratch))
    time.sleep(2)  # Ray tells of a dead worker after a while
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_ray_that_ends_leaves_no_process_no_scratch_and_no_handler(alone: None, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    home = Path.home() / ".ray" / "auth_token"
    had = home.exists()
    mine = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt), RayEngine("ray", deeds.tell, workers=1) as engine:
        assert outcome(engine, deeds.task("cores", tmp_path)).worker
        engine.slots[0].submit(deeds.task("sleep-300", tmp_path), 600)
        time.sleep(1)
        theirs = [p for p in psutil.Process().children(recursive=True) if p not in mine]
        assert theirs
        raise KeyboardInterrupt
    assert gone([*theirs, *workers()], 20)
    assert signal.getsignal(signal.SIGTERM) == before
    assert home.exists() == had
    deadline = time.monotonic() + 5
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())
