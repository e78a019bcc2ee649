"""Options from lora-export.toml, pyproject.toml and the environment: which wins, and what is refused."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from lora_export.commands import configuration
from lora_export.commands.main import cli


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in configuration.in_environment(cli):
        monkeypatch.delenv(name)
    return tmp_path


def run(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, list(words), env=environment)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options with which `merge` and `export` are called, in place of the work."""
    found: dict[str, Any] = {}

    def stop(*arguments: Any, **named: Any) -> Any:
        found["options"] = named.get("options") or arguments[3]
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_export.api.merge", stop)
    monkeypatch.setattr("lora_export.api.export", stop)
    return found


MERGE = ("merge", "-b", "BASE", "-a", "ADAPTER", "-o", "OUT")


def test_a_flag_beats_a_variable_which_beats_the_file(here: Path, seen: dict[str, Any]) -> None:
    (here / "lora-export.toml").write_text('dtype = "float16"\nmax-memory = "1GB"\n[merge]\ncertify = "full"\n')
    run(*MERGE)
    assert (seen["options"].dtype, seen["options"].max_memory, seen["options"].certify) == (
        "float16",
        10**9,
        "full",
    )
    run(*MERGE, LORA_EXPORT_DTYPE="bfloat16")
    assert seen["options"].dtype == "bfloat16"
    run(*MERGE, LORA_EXPORT_DTYPE="bfloat16", LORA_EXPORT_MERGE_DTYPE="float32")
    assert seen["options"].dtype == "float32"
    run(*MERGE, "--dtype", "keep", LORA_EXPORT_DTYPE="bfloat16")
    assert (seen["options"].dtype, seen["options"].certify) == ("keep", "full")


def test_a_table_beats_what_is_meant_for_all(here: Path, seen: dict[str, Any]) -> None:
    (here / "pyproject.toml").write_text(
        '[tool.lora-export]\nprecision = "fp16"\n[tool.lora-export.export]\nprecision = "int4"\nkeep = "auto"\n'
    )
    run("export", "-m", "MODEL", "-o", "OUT")
    assert (seen["options"].precision, seen["options"].quantization.keep) == ("int4", ("auto",))


def test_its_own_file_comes_before_pyproject(here: Path, seen: dict[str, Any]) -> None:
    (here / "pyproject.toml").write_text('[tool.lora-export]\nprecision = "fp16"\n')
    (here / "lora-export.toml").write_text("")
    run("export", "-m", "MODEL", "-o", "OUT")
    assert seen["options"].precision == "fp32"


def test_what_the_file_gives_is_said(here: Path, seen: dict[str, Any]) -> None:
    (here / "lora-export.toml").write_text("allow-nonfinite = true\n")
    said = run(*MERGE, LORA_EXPORT_DTYPE="float16").stderr
    assert "--allow-nonfinite True, from the configuration file" in said
    assert "--dtype float16, from LORA_EXPORT_DTYPE" in said


def test_an_earlier_export_keeps_its_own_options(here: Path, seen: dict[str, Any]) -> None:
    """A default of one's own is no wish for this export; a variable is one."""
    (here / "lora-export.toml").write_text('precision = "int4"\nblock-size = 64\n')
    words = ("export", "-m", "MODEL", "-o", "OUT", "--graph-from", "EARLIER")
    run(*words)
    assert (seen["options"].precision, seen["options"].quantization.block_size) == ("fp32", None)
    refused = run(*words, LORA_EXPORT_PRECISION="int8")
    assert refused.exit_code == 1 and "--precision beside --graph-from" in refused.stderr


def test_sizes_of_the_file_give_way_to_a_grid(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("lora_export.api.benchmark", lambda *_, options, **__: found.append(options.shapes))
    (here / "lora-export.toml").write_text("batch = [2, 4]\n")
    run("benchmark", "-m", "ONNX", "-o", "OUT")
    run("benchmark", "-m", "ONNX", "-o", "OUT", "--grid", "paper")
    assert found == [((2, 128), (4, 128)), ((1, 128), (16, 256), (32, 512))]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('dtipe = "float16"', "did you mean dtype?"),
        ('[merg]\ndtype = "float16"', "did you mean merge?"),
        ('[merge]\nprecision = "int4"', "precision in [merge]"),
        ('dtype = "float8"', "'float8' is not one of"),
        ('max-memory = "much"', "no size"),
        ("density = [1, 2]", "density = [1, 2]"),
        ("force = true", "force is no option"),
        ('[verify]\nruntime = "./python"', "runtime in [verify]"),
        ('[package]\npush = "me/model"', "push in [package]"),
        ("dtype = ", "no TOML"),
    ],
)
def test_a_bad_file_is_refused(here: Path, seen: dict[str, Any], text: str, told: str) -> None:
    (here / "lora-export.toml").write_text(text)
    result = run(*MERGE, "--json")
    assert result.exit_code == 1 and not seen
    document = json.loads(result.stdout)
    assert document["error"] == "InputError" and document["where"].endswith("lora-export.toml")
    assert told in result.stderr
    assert run("merge", "--help").exit_code == 0


def test_no_variable_replaces_an_output_or_names_a_program() -> None:
    for command in cli.commands.values():
        for option in command.params:
            if isinstance(option, click.Option) and option.name in configuration.NOT_HERE:
                assert not option.envvar


def test_env_shows_all_of_it(here: Path) -> None:
    (here / "lora-export.toml").write_text('provider = "cpu"\n[merge]\ndtype = "float16"\n')
    found = json.loads(run("env", "--json", LORA_EXPORT_TEXT="mine.txt").stdout)["configuration"]
    assert found == {
        "file": "lora-export.toml",
        "values": {"provider": "cpu", "merge": {"dtype": "float16"}},
        "error": None,
        "environment": {"LORA_EXPORT_TEXT": "mine.txt"},
    }
    (here / "lora-export.toml").write_text("nonsense = 1\n")
    result = run("env")
    assert result.exit_code == 0 and "nonsense is no option" in result.stdout


def test_values_of_other_commands_are_not_looked_at(here: Path, seen: dict[str, Any]) -> None:
    (here / "lora-export.toml").write_text('[validate]\nprompts = "not-there.txt"\n')
    run(*MERGE)
    assert seen["options"].dtype == "keep"
    result = run("validate", "-b", "B", "-a", "A", "-m", "M")
    assert result.exit_code == 1 and "does not exist" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_given_their_completion(shell: str) -> None:
    environment = {"_LORA_EXPORT_COMPLETE": f"{shell}_source"}
    result = CliRunner().invoke(cli, [], prog_name="lora-export", env=environment)
    assert result.exit_code == 0 and "_LORA_EXPORT_COMPLETE" in result.stdout
