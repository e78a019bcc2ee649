"""One thread beside a run's own: what it carries out, how it is stopped, and which error is told."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import SimpleNamespace

import psutil
import pytest

from lora_export.contracts import Progress
from lora_export.errors import ExportError, InputError
from lora_export.progress import Silent
from lora_export.workflows import beside
from lora_export.workflows.beside import Beside, Later, fits

PATIENCE = 20  # seconds, for a machine that has other things to do


def refused() -> None:
    raise AssertionError("nothing is stopped where nothing runs")


def test_begin_stages_run_in_turn_in_another_thread() -> None:
    with Beside(Silent(), refused, at_once=True) as two:
        threads = [two.begin(lambda told: threading.current_thread().name) for _ in range(3)]
        assert {t.result() for t in threads} == {"beside_0"}


def test_begin_runs_while_this_thread_works() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def stage(progress: Progress) -> str:
        begun.set()
        assert go_on.wait(PATIENCE)
        return "made"

    with Beside(Silent(), refused, at_once=True) as two:
        made = two.begin(stage)
        assert begun.wait(PATIENCE)  # and this thread is here
        go_on.set()
        assert made.result() == made[0] == "made"


def test_begin_without_thread_runs_in_place_and_spare_stages_when_asked() -> None:
    done: list[str] = []

    def stage(name: str) -> Callable[[Progress], str]:
        def run(progress: Progress) -> str:
            done.append(f"{name} in {threading.current_thread().name}")
            return name

        return run

    with Beside(Silent(), refused, at_once=False) as one:
        first, spare, never = (
            one.begin(stage("first")),
            one.begin(stage("spare"), spare=True),
            one.begin(stage("never"), spare=True),
        )
        assert done == ["first in MainThread"]
        assert (spare.result(), spare.result(), first.result(), len(never)) == ("spare", "spare", "first", 1)
    assert done == ["first in MainThread", "spare in MainThread"]


def test_later_sequence_waits_only_for_who_takes_its_item() -> None:
    asked: list[int] = []

    def make() -> int:
        asked.append(1)
        return 7

    later: Later[int] = Later(make)
    assert later and len(later) == 1 and not asked
    assert (later[0], [*later], list(later[:1]), asked) == (7, [7], [7], [1])


def test_result_raises_what_the_stage_raised() -> None:
    error = ExportError("no graph")

    def stage(progress: Progress) -> None:
        raise error

    with pytest.raises(ExportError) as told, Beside(Silent(), refused, at_once=True) as two:
        two.begin(stage).result()
    assert told.value is error


@pytest.mark.parametrize(
    ("later", "told"), [(InputError("later"), "first"), (KeyboardInterrupt("mine"), "mine"), (None, None)]
)
def test_first_error_is_told_unless_a_person_ends_the_run(later: BaseException | None, told: str | None) -> None:
    failed = threading.Event()

    def stage(progress: Progress) -> None:
        failed.set()
        raise ExportError("first")

    def run() -> None:
        with Beside(Silent(), refused, at_once=True) as two:
            two.begin(stage)
            failed.wait(PATIENCE)
            time.sleep(0.05)  # until the future knows
            if later is not None:
                raise later

    if told is None:  # nobody asked for what failed
        run()
        return
    with pytest.raises(KeyboardInterrupt if told == "mine" else ExportError, match=told):
        run()


@pytest.mark.parametrize("error", [None, InputError("another one"), KeyboardInterrupt("mine")])
def test_end_stops_what_runs_and_begins_nothing_more(error: BaseException | None) -> None:
    begun, stopped, ends = threading.Event(), threading.Event(), list[str]()

    def stage(progress: Progress) -> None:
        begun.set()
        assert stopped.wait(PATIENCE)
        try:
            progress.advance(1, 2)
        except CancelledError:
            ends.append("cancelled")
            raise

    def run() -> None:
        with Beside(Silent(), stopped.set, at_once=True) as two:
            two.begin(stage)
            two.begin(lambda told: ends.append("begun"))
            begun.wait(PATIENCE)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error), match=str(error)):
            run()
    assert ends == ["cancelled"]
    assert not [t for t in threading.enumerate() if t.name.startswith("beside")]


@pytest.mark.parametrize(
    ("cores", "available", "memory", "wanted"),
    [
        (2, 1200, None, True),
        (2, 1199, None, False),
        (1, 10**6, None, False),
        (2, 1, 600, True),
        (2, 10**6, 599, False),
    ],
)
def test_fits_asks_for_a_second_core_and_six_copies(
    monkeypatch: pytest.MonkeyPatch, cores: int, available: int, memory: int | None, wanted: bool
) -> None:
    monkeypatch.setattr(beside, "cores", lambda: cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert fits(100, memory) is wanted
