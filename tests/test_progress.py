"""Progress of two threads: whose line is whose, whose bar it is, and how the second one is stopped."""

import io
from concurrent.futures import CancelledError

import pytest

from lora_export.progress import Console, Turns


class Noted:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def stage(self, title: str) -> None:
        self.told.append(("stage", title))

    def detail(self, text: str) -> None:
        self.told.append(("detail", text))

    def warn(self, text: str) -> None:
        self.told.append(("warn", text))

    def advance(self, done: int, total: int) -> None:
        self.told.append(("advance", done, total))


def test_turns_tell_what_both_threads_say_and_the_bar_of_the_first() -> None:
    noted = Noted()
    turns = Turns(noted)
    turns.stage("validate")
    turns.beside.stage("export")
    turns.beside.detail("proving")
    turns.beside.advance(1, 3)
    turns.advance(2, 4)
    turns.beside.warn("odd")
    turns.beside.over()
    turns.detail("done")
    turns.warn("mine")
    assert noted.told == [
        ("stage", "validate"), ("stage", "export"), ("detail", "meanwhile: proving"), ("advance", 2, 4),
        ("warn", "odd"), ("detail", "done"), ("warn", "mine"),
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["stage", "detail", "warn", "advance"])
def test_turns_stop_ends_the_second_thread_at_its_next_word(call: str) -> None:
    noted = Noted()
    turns = Turns(noted)
    turns.stop()
    with pytest.raises(CancelledError):
        getattr(turns.beside, call)(*((1, 2) if call == "advance" else ("text",)))
    turns.beside.over()
    turns.stage("the run's own thread goes on")
    assert noted.told == [("stage", "the run's own thread goes on")]


def test_console_says_what_runs_beside(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(1) as console:
        turns = Turns(console)
        turns.stage("validate")
        turns.beside.stage("export")
        turns.beside.detail("proving")
        turns.beside.over()
    assert capsys.readouterr().err == "• validate\n• meanwhile: export\n    meanwhile: proving\n"


def test_console_quiet_says_no_stage_beside(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(-1) as console:
        Turns(console).beside.stage("export")
    assert capsys.readouterr().err == ""


def test_console_bar_names_both_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    with Console() as console:
        assert console._bar is not None
        turns, tasks = Turns(console), console._bar.tasks
        turns.stage("validate")
        turns.beside.stage("export")
        assert [t.description for t in console._bar.tasks] == ["validate, meanwhile export"]
        turns.stage("validate: more")
        assert [t.description for t in console._bar.tasks] == ["validate: more, meanwhile export"]
        turns.beside.over()
        assert [t.description for t in console._bar.tasks] == ["validate: more"] and not tasks
