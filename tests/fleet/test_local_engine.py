"""Workers of this machine: each way to go wrong is blamed on one task, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lora_export.contracts.fleet import RowOutcome
from lora_export.errors import WorkerLost
from lora_export.fleet.engines import local, workers
from lora_export.fleet.engines.local import LocalEngine
from tests.fleet import fakes

SOON = 20.0  # seconds in which everything here is done, on a busy machine too


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def engine(scratch: Path) -> Iterator[LocalEngine]:
    with LocalEngine(fakes.WORK, 2, scratch) as engine:
        yield engine


def outcome(engine: LocalEngine, scratch: Path, name: str, timeout: float = SOON, slot: int = 0) -> RowOutcome:
    return engine.slots[slot].submit(fakes.task(name, scratch), timeout).result(SOON + timeout)


def found(outcome: RowOutcome) -> str:
    return str((outcome.error or {})["found"])


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("exit0", "with status 0"),
        pytest.param("exit7", "with status 7", marks=pytest.mark.slow),
        ("segv", "signal 11 (SIGSEGV)"),
        pytest.param("kill", "signal 9 (SIGKILL)", marks=pytest.mark.slow),
    ],
)
def test_task_worker_dies_is_blamed_alone(engine: LocalEngine, scratch: Path, way: str, words: str) -> None:
    beside = engine.slots[1].submit(fakes.task("short", scratch), SOON)
    dead = outcome(engine, scratch, way)
    assert (dead.name, dead.state, dead.key) == (way, "died", f"{way}-key")
    assert words in found(dead) and "in the middle of this row" in found(dead)
    assert way != "segv" or ("Segmentation fault" in found(dead) and "fakes.py" in found(dead))
    assert beside.result(SOON).state == "done"
    assert outcome(engine, scratch, "ok").state == "done"


@pytest.mark.parametrize("way", ["lock", pytest.param("sleep", marks=pytest.mark.slow)])
def test_task_too_long_is_ended(engine: LocalEngine, scratch: Path, way: str) -> None:
    late = outcome(engine, scratch, way, timeout=0.2)
    assert late.state == "timeout" and "not done within 0.2 s" in found(late)
    assert outcome(engine, scratch, "ok").state == "done"


def test_task_without_memory_is_told(engine: LocalEngine, scratch: Path) -> None:
    with pytest.raises(WorkerLost, match="not enough memory"):
        outcome(engine, scratch, "memory")
    assert outcome(engine, scratch, "ok").state == "done"


@pytest.mark.parametrize("way", ["odd", pytest.param("refuse", marks=pytest.mark.slow)])
def test_task_exception_is_raised_in_words_and_worker_replaced(
    engine: LocalEngine, scratch: Path, way: str
) -> None:
    before = outcome(engine, scratch, "ok").worker
    with pytest.raises(WorkerLost, match=r"odd|no such adapter"):
        outcome(engine, scratch, way)
    assert outcome(engine, scratch, "ok").worker != before


def test_worker_is_kept_for_next_task_until_renewed(engine: LocalEngine, scratch: Path) -> None:
    pids = [outcome(engine, scratch, "ok").worker for _ in range(3)]
    engine.slots[0].renew()
    assert len({*pids}) == 1 and outcome(engine, scratch, "nan").worker not in pids


def test_task_children_end_with_their_worker(
    engine: LocalEngine, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKES_PIDS", str(tmp_path / "pids"))
    engine.slots[0].renew()  # workers get the variables of their start
    assert outcome(engine, scratch, "children", timeout=1.0).state == "timeout"
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(children) == 2
    assert_gone(children)


def test_worker_killed_while_idle_is_replaced_without_blame(engine: LocalEngine, scratch: Path) -> None:
    os.kill(int(outcome(engine, scratch, "ok").worker), 9)
    assert outcome(engine, scratch, "ok").state == "done"


def test_worker_libraries_say_nothing_to_the_terminal(
    engine: LocalEngine, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome(engine, scratch, "noise")
    assert capfd.readouterr() == ("", "")


def test_workers_share_out_the_cores() -> None:
    assert [local._share((0, 2, 4, 6), i, 2) for i in range(2)] == [(0, 2), (4, 6)]
    assert [local._share((0, 1), i, 1) for i in range(3)] == [(0,), (1,), (0,)]


def test_worker_threads_are_not_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    workers.share(4)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("4", "1")


def test_engine_worker_that_cannot_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with LocalEngine(fakes.WORK, 1, tmp_path) as engine:
        engine.slots[0]._settings = workers.Start(os.getpid(), (), 1, tmp_path / "file", "name")  # type: ignore[attr-defined]
        dead = outcome(engine, tmp_path, "ok")
    assert dead.state == "died" and "before it took up this row" in found(dead)


def test_engine_closed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with LocalEngine(fakes.WORK, 1, tmp_path) as engine:
        future = engine.slots[0].submit(fakes.task("sleep", tmp_path), SOON)
        wait_for(lambda: any(tmp_path.glob("*/task-*/object/half")))
    assert future.result(0).state == "died"
    assert not list(tmp_path.iterdir())


def test_driver_killed_ends_workers_and_their_children(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.fleet import fakes\n"
        "from lora_export.fleet.engines.local import LocalEngine\n"
        "if __name__ == '__main__':\n"
        "    p = Path(sys.argv[1])\n"
        "    with LocalEngine(fakes.WORK, 1, p) as e: e.slots[0].submit(fakes.task('children', p), 99).result()\n"
    )
    (tmp_path / "drive.py").write_text(code)
    pids = tmp_path / "pids"
    variables = os.environ | {"FAKES_PIDS": str(pids), "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    driver = subprocess.Popen([sys.executable, str(tmp_path / "drive.py"), str(tmp_path / "s")], env=variables)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    family = [p.pid for p in psutil.Process(driver.pid).children(recursive=True)]
    driver.kill()
    driver.wait()
    assert len(family) >= 4  # sentry, worker, and two of the worker's
    assert_gone(family)


def wait_for(what: object) -> None:
    end = time.monotonic() + SOON
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_gone(pids: list[int]) -> None:
    def gone() -> bool:
        return not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids)

    wait_for(gone)
