"""Options from lora-export.toml, pyproject.toml and the environment: which wins, and what is refused."""

import json
from pathlib import Path
from typing import Any

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


def test_configuration_flag_beats_variable_beats_file(here: Path, seen: dict[str, Any]) -> None:
    (here / "lora-export.toml").write_text('max-memory = "1GB"\n[merge]\nmax-shard-size = "7GB"\n')
    run(*MERGE)
    assert (seen["options"].max_memory, seen["options"].max_shard_size) == (10**9, 7 * 10**9)
    run(*MERGE, LORA_EXPORT_MAX_MEMORY="2GB")
    assert seen["options"].max_memory == 2 * 10**9
    run(*MERGE, LORA_EXPORT_MAX_MEMORY="2GB", LORA_EXPORT_MERGE_MAX_MEMORY="3GB")
    assert seen["options"].max_memory == 3 * 10**9
    run(*MERGE, "--max-memory", "4GB", LORA_EXPORT_MAX_MEMORY="2GB")
    assert (seen["options"].max_memory, seen["options"].max_shard_size) == (4 * 10**9, 7 * 10**9)


def test_configuration_table_beats_keys_for_all_commands(here: Path, seen: dict[str, Any]) -> None:
    (here / "pyproject.toml").write_text(
        '[tool.lora-export]\noptimize = "basic"\n[tool.lora-export.export]\noptimize = "none"\nengine = "dynamo"\n'
    )
    run("export", "-m", "MODEL", "-o", "OUT")
    assert (seen["options"].optimize, seen["options"].engine) == ("none", "dynamo")


def test_configuration_own_file_beats_pyproject(here: Path, seen: dict[str, Any]) -> None:
    (here / "pyproject.toml").write_text('[tool.lora-export]\noptimize = "none"\n')
    (here / "lora-export.toml").write_text("")
    run("export", "-m", "MODEL", "-o", "OUT")
    assert seen["options"].optimize == "full"


def test_configuration_from_file_is_reported(here: Path, seen: dict[str, Any]) -> None:
    (here / "lora-export.toml").write_text('device = "cuda"\n')
    said = run(*MERGE, LORA_EXPORT_DTYPE="float16").stderr
    assert "--device cuda, from lora-export.toml" in said
    assert "--dtype float16, from LORA_EXPORT_DTYPE" in said


def test_configuration_does_not_change_graph_from_options(here: Path, seen: dict[str, Any]) -> None:
    """A default of one's own is no wish for this export; a variable is one."""
    (here / "lora-export.toml").write_text('optimize = "none"\nengine = "dynamo"\n')
    words = ("export", "-m", "MODEL", "-o", "OUT", "--graph-from", "EARLIER")
    run(*words)
    assert (seen["options"].optimize, seen["options"].engine) == ("full", None)
    refused = run(*words, LORA_EXPORT_PRECISION="int8")
    assert refused.exit_code == 1 and "--precision with --graph-from" in refused.stderr


# Why each of the others must not stand in a file.
ASKED_FOR = {
    "what is compared, with what": """
        adapter base base-onnx beside compare from graph-from merged model onnx original-base own-text pluggable
        plugged pytorch to tuned unmerged""",
    "what comes out": """
        accuracy-level activations archive backend base-weights block-size calibration combine combine-on density
        dtype energy expert-layout expert-packing for keep license majority-sign name no-merged-folder
        picture precision quantizer rank rest seed shared-as skip split-qkv-alpha svd-rank task
        training-double-quant training-quantization variant""",
    "what is looked at": """
        arm batch certify compare-bases graph grid max-size max-time prompt-length prompts provider requantize rows
        sessions size steps text validation-memory validation-seed""",
    "what passes": "allow-nonfinite margin min-survival tolerance",
    "what is said": "quiet",
    "what other runs find": "cache cache-size no-cache",
    "where it is written, and what is run": "converter dry-run force key output private push run runtime sign",
    "which rows of a fleet are worked on, and where": "again disk on retries scratch shard timeout workers",
}


def test_configuration_every_option_is_listed() -> None:
    options = {k for c in cli.commands.values() for k in configuration.options(c)}
    asked = {name for names in ASKED_FOR.values() for name in names.split()}
    in_a_file = set(configuration.in_a_file(cli))
    assert options == asked | in_a_file and not asked & in_a_file


@pytest.mark.parametrize("name", sorted({n for names in ASKED_FOR.values() for n in names.split()}))
@pytest.mark.parametrize("file", ["lora-export.toml", "pyproject.toml"])
def test_configuration_option_that_affects_verdict_is_refused(
    name: str, file: str, here: Path, seen: dict[str, Any]
) -> None:
    """With any value, at the top and in a table, and for the commands that do not have the option, too."""
    commands = [n for n, c in cli.commands.items() if name in configuration.options(c)]
    head = "[tool.lora-export" if file == "pyproject.toml" else "["
    top = f"{head}]\n" if file == "pyproject.toml" else ""
    table = f"{head}.{commands[0]}]\n" if file == "pyproject.toml" else f"[{commands[0]}]\n"
    for text in (top, table):
        (here / file).write_text(f'{text}{name} = "1"\n')
        result = run(*MERGE, "-q", "--json")
        assert result.exit_code == 1 and not seen
        told = json.loads(result.stdout)
        assert told["found"].startswith(f"{name} must not stand in a configuration file") and file in told["where"]
        option = configuration.options(cli.commands[commands[0]])[name]
        variable = f"LORA_EXPORT_{name.upper().replace('-', '_')}"
        assert f"--{name} on the command line" in told["next"]
        assert (variable in told["next"]) == bool(option.envvar)
        assert option.configurable == "command line" or variable in (option.envvar or ())  # type: ignore[attr-defined]


def test_configuration_is_named_even_when_quiet(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.contracts import Check, ValidationResult

    result = ValidationResult((Check("logits_max_abs", 0.1, 1.0, True, "measured"),))
    monkeypatch.setattr("lora_export.api.validate", lambda *_, **__: result)
    words = ("validate", "-b", "B", "-a", "A", "-m", "M", "-q")
    assert "configur" not in run(*words).output + run(*words, "--json").output
    (here / "lora-export.toml").write_text('max-memory = "1GB"\n[merge]\ndevice = "cuda"\n')
    assert "configured by lora-export.toml: --max-memory 1000000000" in run(*words).stdout
    found = json.loads(run(*words, "--json").stdout)["configuration"]
    assert found == {"file": str(here / "lora-export.toml"), "options": {"max-memory": "1000000000"}}
    assert "configuration" not in json.loads(run(*words, "--json", "--max-memory", "2GB").stdout)


def test_configuration_is_named_in_refusals(here: Path) -> None:
    (here / "lora-export.toml").write_text('max-memory = "1GB"\n')
    result = run(*MERGE, "-q", "--json")
    assert "configured by lora-export.toml: --max-memory 1000000000" in result.stderr
    assert json.loads(result.stdout)["configuration"]["options"] == {"max-memory": "1000000000"}


def test_configuration_max_memory_does_not_affect_validation(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read layer by layer, a model is not compared as it is loaded."""
    found: list[Any] = []
    monkeypatch.setattr("lora_export.api.validate", lambda *_, options, **__: found.append(options.max_memory))
    (here / "lora-export.toml").write_text('max-memory = "1MB"\n')
    words = ("validate", "-b", "B", "-a", "A", "-m", "M")
    run(*words)
    run(*words, LORA_EXPORT_MAX_MEMORY="2MB")
    run(*words, "--max-memory", "3MB")
    assert found == [None, 2 * 10**6, 3 * 10**6]


def test_configuration_is_named_in_report(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.contracts.option import kept
    from lora_export.report.story import sources
    from lora_export.workflows.run_report import new_report

    (here / "lora-export.toml").write_text('engine = "dynamo"\nmax-memory = "1GB"\n')
    found: list[Any] = []
    monkeypatch.setattr("lora_export.api.merge_and_export", lambda *a, **_: found.append(a[3]))
    monkeypatch.setattr("lora_export.api.benchmark", lambda *_, options, **__: found.append(options))
    run("merge-and-export", "-b", "B", "-a", "A", "-o", "OUT")
    line = ("Configured by", "lora-export.toml: --engine dynamo, --max-memory 1000000000")
    found_lines = sources(new_report("x", kept(found[0])))
    assert [(k, f"lora-export.toml: {', '.join(sorted(v[18:].split(', ')))}") for k, v in found_lines] == [line]
    run("benchmark", "-m", "ONNX", "-o", "OUT")
    assert found[1].configured == ""  # benchmark has none of these options


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('devise = "cpu"', "did you mean device?"),
        ('[merg]\ndevice = "cpu"', "did you mean merge?"),
        ('[merge]\nengine = "dynamo"', "engine in [merge]"),
        ('device = "abacus"', "'abacus' is not one of"),
        ('max-memory = "much"', "not a size"),
        ("max-memory = [1, 2]", "max-memory = [1, 2]"),
        ("force = true", "force must not stand"),
        ("tolerance = 1e9", "tolerance must not stand"),
        ('[verify]\nruntime = "./python"', "runtime must not stand"),
        ('[package]\npush = "me/model"', "push must not stand"),
        ("device = ", "not TOML"),
    ],
)
def test_configuration_bad_file_is_refused(here: Path, seen: dict[str, Any], text: str, told: str) -> None:
    (here / "lora-export.toml").write_text(text)
    result = run(*MERGE, "--json")
    assert result.exit_code == 1 and not seen
    document = json.loads(result.stdout)
    assert document["error"] == "InputError" and document["where"].endswith("lora-export.toml")
    assert told in result.stderr
    assert run("merge", "--help").exit_code == 0


def test_configuration_variables_cannot_set_outputs_or_programs() -> None:
    names = {
        "output", "force", "dry-run", "run", "runtime", "converter", "key", "sign", "push", "private", "scratch",
    }  # fmt: skip
    unset = [item for c in cli.commands.values() for item in configuration.options(c).items() if item[0] in names]
    assert {name for name, _ in unset} == names and not any(option.envvar for _, option in unset)


def test_env_shows_configuration(here: Path) -> None:
    (here / "lora-export.toml").write_text('device = "cpu"\n[merge]\nmax-memory = "1GB"\n')
    found = json.loads(run("env", "--json", LORA_EXPORT_TEXT="mine.txt").stdout)["configuration"]
    assert found == {
        "file": "lora-export.toml",
        "values": {"device": "cpu", "merge": {"max-memory": "1GB"}},
        "error": None,
        "environment": {"LORA_EXPORT_TEXT": "mine.txt"},
    }
    (here / "lora-export.toml").write_text("nonsense = 1\n")
    result = run("env")
    assert result.exit_code == 0 and "nonsense is not an option" in result.stdout


def test_configuration_of_other_commands_is_ignored(here: Path, seen: dict[str, Any]) -> None:
    (here / "lora-export.toml").write_text('[validate]\ndevice = "abacus"\n')
    run(*MERGE)
    assert seen["options"].device == "cpu"
    result = run("validate", "-b", "B", "-a", "A", "-m", "M")
    assert result.exit_code == 1 and "'abacus' is not one of" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell: str) -> None:
    environment = {"_LORA_EXPORT_COMPLETE": f"{shell}_source"}
    result = CliRunner().invoke(cli, [], prog_name="lora-export", env=environment)
    assert result.exit_code == 0 and "_LORA_EXPORT_COMPLETE" in result.stdout
