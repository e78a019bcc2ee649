"""One field with its metadata is an option everywhere: command line, help, file, variables, JSON, reference."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import click
import pytest
from click.testing import CliRunner

from lora_export.commands import configuration, derive
from lora_export.commands.main import COMMANDS, cli
from lora_export.contracts.option import declared, kept, nested, option, switched
from lora_export.contracts.options import MergeOptions, StoryOptions
from lora_export.errors import InputError

sys.path.insert(0, "tools")  # where reference.py imports its sibling from


@dataclass(frozen=True)
class Inner:
    SECTION: ClassVar[str] = "Inner things"
    depth: int | None = option(None, "How deep.", minimum=1)


@dataclass(frozen=True)
class Search:
    SECTION: ClassVar[str] = "Inner things"
    steps: int | None = option(None, "With --search: how long.")


@dataclass(frozen=True)
class Added:
    """The options of a command, with one that no other file knows: `speed`."""

    SECTION: ClassVar[str] = "Added things"
    speed: Literal["slow", "fast"] = option("slow", "How fast.", configurable="file")
    size: int = option(10, "How large.", unit="bytes", default_text="10 bytes")
    tags: tuple[str, ...] = option((), "Words.", flags=("--tag",))
    folder: Path | None = option(None, "A place.", metavar="WHERE", json="place")
    plain: bool = option(True, "Not plain.", flags=("--no-plain",), json=None)
    inner: Inner = nested(Inner, flat=True)
    search: Search | None = switched(Search, "--search", "Search.", "Inner things", json=None)


def made(monkeypatch: pytest.MonkeyPatch, *words: str, **environment: str) -> Added:
    """The options that a command with them reads from its line, the folder's file and the environment."""
    read: list[Added] = []

    @derive.command("add", derive.options_of(Added))
    def add(talk: Any, **given: Any) -> None:
        read.append(derive.build(Added, given))

    monkeypatch.setattr(cli, "commands", {"add": add})
    result = CliRunner().invoke(cli, ["add", *words], env=environment)
    if result.exit_code:
        raise InputError(result.output)
    return read[0]


def test_derive_field_is_option_of_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(monkeypatch) == Added()
    words = (
        "--speed",
        "fast",
        "--size",
        "2KB",
        "--tag",
        "a",
        "--tag",
        "b",
        "--folder",
        "x",
        "--no-plain",
        "--depth",
        "3",
    )
    assert made(monkeypatch, *words) == Added("fast", 2000, ("a", "b"), Path("x"), False, Inner(3))
    assert made(monkeypatch, "--search", "--steps", "2").search == Search(2)
    with pytest.raises(InputError, match="--steps without --search"):
        made(monkeypatch, "--steps", "2")
    for wrong in (("--speed", "faster"), ("--depth", "0"), ("--size", "much")):
        with pytest.raises(InputError, match="Invalid value"):
            made(monkeypatch, *wrong)


def test_derive_field_is_in_its_help_section(monkeypatch: pytest.MonkeyPatch) -> None:
    command = derive.command("add", derive.options_of(Added))(lambda talk: None)
    text = command.get_help(click.Context(command, info_name="add"))
    added, _, inner = text.partition("Added things:")[2].partition("Inner things:")
    assert "--speed [slow|fast]" in added and "How fast.  [default: slow]" in added
    assert "[default: 10 bytes]" in added and "--depth" not in added and "--depth" in inner
    assert "--json" in text.partition("Messages:")[2]


def test_derive_field_can_be_set_by_file_and_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path(configuration.FILE).write_text('speed = "fast"\n')
    assert made(monkeypatch).speed == "fast"
    assert made(monkeypatch, LORA_EXPORT_SPEED="slow").speed == "slow"
    assert made(monkeypatch, LORA_EXPORT_ADD_SIZE="1KB").size == 1000
    Path(configuration.FILE).write_text("size = 5\n")  # it is not configurable in a file
    with pytest.raises(InputError, match="size must not stand in a configuration file"):
        made(monkeypatch)


def test_derive_field_round_trips_json() -> None:
    document = kept(replace(Added(), folder=Path("/some/where"), inner=Inner(2)))
    assert document == {"speed": "slow", "size": 10, "tags": [], "place": "where", "depth": 2}
    assert kept(Added("fast"), default=("speed",))["speed"] == "slow"  # it did not matter


def test_derive_field_is_on_reference_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import reference

    command = derive.command("add", derive.options_of(Added))(lambda talk: None)
    monkeypatch.setattr(cli, "commands", {"add": command})
    assert "--speed [slow|fast]" in reference.commands()


def test_derive_every_story_field_is_an_option() -> None:
    """So that a field that is added to any of the nested dataclasses is offered without another line."""
    fields = [how for _, how in declared(MergeOptions)]
    names = {o.opts[-1] for o in derive.options_of(StoryOptions)}
    assert len(fields) > 15 and {derive.flag_of(f.name, how) for f, how in declared(MergeOptions)} <= names  # type: ignore[arg-type]


def test_command_list_matches_help() -> None:
    for name, sentence in COMMANDS.items():
        help_text = " ".join((cli.commands[name].help or "").split())
        assert help_text.startswith(sentence), name


@pytest.mark.parametrize("words", [("--json", "-q", "env"), ("env", "--json", "-q"), ("-q", "env", "--json")])
def test_message_options_work_anywhere_on_the_line(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_export.api.env", lambda: {"lora_export": "1", "platform": "", "cpu_count": 1,
                        "memory_bytes": 1, "versions": {}, "providers": []})  # fmt: skip
    result = CliRunner().invoke(cli, list(words))
    assert result.exit_code == 0 and result.stdout.startswith("{") and result.stderr == ""
