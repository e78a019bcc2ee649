"""`from lora_export import merge, …`: the functions, their defaults, their silence and their words."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from peft import LoraConfig

import lora_export
from lora_export import api
from lora_export.checkpoint.sources import adapter_choices
from lora_export.commands.main import cli
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkOptions,
    ExportOptions,
    FleetOptions,
    MergeOptions,
    PackageOptions,
    RankOptions,
    StoryOptions,
    ValidationOptions,
    VerifyOptions,
)
from lora_export.errors import InputError, LoraExportError
from lora_export.progress import Silent
from tests.builders import save_adapter, save_base

FUNCTIONS = tuple(name for name in lora_export.__all__ if not name.startswith("_"))


def test_api_names_are_functions_after_any_import() -> None:
    program = (
        "import lora_export.merging, lora_export.benchmarking, lora_export.packages\n"
        f"from lora_export import {', '.join(FUNCTIONS)}\n"
        f"assert all(callable(f) for f in ({', '.join(FUNCTIONS)}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_loads_nothing_heavy() -> None:
    program = "import sys, lora_export; from lora_export import merge; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_api_unknown_name_is_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        _ = lora_export.mrege


@pytest.mark.parametrize("name", FUNCTIONS)
def test_api_documents_every_parameter(name: str) -> None:
    function = getattr(lora_export, name)
    text = inspect.getdoc(function) or ""
    arguments, _, rest = text.partition("Returns:")
    named = [
        line.split(":")[0].strip() for line in arguments.splitlines() if line.startswith("    ") and ":" in line
    ]
    assert [n for n in named if n in inspect.signature(function).parameters] == [
        *inspect.signature(function).parameters
    ]
    assert "Raises:" in rest and rest.partition("Raises:")[0].strip()


# Command → what is given, and the function with the arguments that it gets; others have their defaults.
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "merge-and-export": ("-b B -a A -o O", "merge_and_export",
                         {"base": "B", "adapters": ("A",), "output": Path("O"), "options": StoryOptions()}),
    "merge": ("-b B -a A -o O", "merge",
              {"base": "B", "adapters": ("A",), "output": Path("O"), "options": MergeOptions()}),
    "validate": ("-b B -a A -m M", "validate",
                 {"base": "B", "adapters": ("A",), "merged": Path("M"), "options": ValidationOptions(stated=())}),
    "export": ("-m M -o O", "export", {"model": "M", "output": Path("O"), "options": ExportOptions()}),
    "benchmark": ("-m M -o O", "benchmark",
                  {"merged": Path("M"), "output": Path("O"), "options": BenchmarkOptions()}),
    "package": ("R --for genai -o O", "package",
                {"run": Path("R"), "target": "genai", "output": Path("O"), "options": PackageOptions()}),
    "fleet": ("J -o R", "fleet", {"jobs": Path("J"), "root": "R", "options": FleetOptions()}),
    "switch": ("-m M --from A --to B", "switch",
               {"model": Path("M"), "before": ("A",), "after": ("B",), "options": MergeOptions()}),
    "combine": ("-a A -o O", "combine", {"adapters": ("A",), "output": Path("O"), "rank": RankOptions(),
                                         "options": MergeOptions(combine="linear")}),
    "extract": ("-b B -m T -o O", "extract",
                {"base": "B", "tuned": "T", "output": Path("O"), "rank": RankOptions()}),
    "truncate": ("-a A -o O", "truncate", {"adapter": "A", "output": Path("O"), "rank": RankOptions()}),
    "inspect": ("P", "inspect", {"path": "P"}),
    "inspect -a": ("-a A", "understand", {"adapter": "A"}),
    "report": ("R", "report", {"run": "R"}),  # a path would take the second slash of a URL
    "verify": ("P", "verify", {"path": "P", "options": VerifyOptions()}),
    "env": ("", "env", {}),
}  # fmt: skip


def test_api_tests_list_every_command() -> None:
    assert {name.split()[0] for name in CALLS} == set(cli.commands)


@pytest.mark.parametrize("command", CALLS)
def test_command_without_options_calls_function_with_defaults(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    words, name, expected = CALLS[command]
    signature = inspect.signature(getattr(api, name))
    called: dict[str, Any] = {}

    def stop(*arguments: Any, **named: Any) -> Any:
        called.update(signature.bind(*arguments, **named).arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, name, stop)
    assert CliRunner().invoke(cli, [command.split()[0], *words.split()]).exit_code == 130
    called.pop("progress", None)
    defaults = {n: p.default for n, p in signature.parameters.items() if n not in expected and n in called}
    defaults = {n: [] if n == "beside" else v for n, v in defaults.items()}
    assert called == expected | defaults


def test_api_single_adapter_needs_no_list(pair: tuple[Path, Path]) -> None:
    _, adapter = pair
    for one in (adapter, str(adapter), AdapterChoice(adapter)):
        (choice,) = adapter_choices(one)
        assert (choice.folder, choice.weight) == (adapter, 1.0)
    weighted = [f"{adapter}:0.5", (adapter, 0.5), AdapterChoice(adapter, 0.5)]
    assert [(c.folder, c.weight) for c in adapter_choices(weighted)] == [(adapter, 0.5)] * 3
    with pytest.raises(LoraExportError, match="--unmerged with 0 adapters"):
        lora_export.export("B", "O", options=ExportOptions(unmerged=True))
    with pytest.raises(LoraExportError, match="--adapter with --graph-from"):  # not one for each character
        lora_export.export("B", "O", adapters="path", options=ExportOptions(graph_from=Path("X")))


def test_only_commands_print_or_exit() -> None:
    package = Path(lora_export.__file__).parent
    found = []
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            raised = ast.unparse(node.exc) if isinstance(node, ast.Raise) and node.exc else ""
            if called in ("print", "sys.exit", "exit", "click.echo") or raised.startswith("SystemExit"):
                found.append((room, called or raised))
    elsewhere = [f for f in found if f[0] not in ("commands", "__main__.py")]
    assert found and elsewhere == []


class Heard(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.done: list[tuple[int, int]] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def advance(self, done: int, total: int) -> None:
        self.done.append((done, total))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("api")
    base = save_base(work / "base")
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return base, save_adapter(work / "adapter", base, config)


def test_api_merge_reports_progress_and_prints_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    heard = Heard()
    result = lora_export.merge(
        base, [(adapter, 0.5)], tmp_path / "out", MergeOptions(dtype="float16"), progress=heard
    )
    assert result.output == tmp_path / "out" and result.dtype == "float16" and result.tensors["updated"] == 4
    assert heard.stages and heard.done[-1][0] == heard.done[-1][1] > 0
    assert lora_export.verify(result.output, base, [(adapter, 0.5)]).verified
    assert not lora_export.verify(result.output, base, adapter).verified  # another weight
    assert capfd.readouterr() == ("", "")


def test_api_error_has_its_parts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    with pytest.raises(InputError, match=r"no adapter_config\.json here") as caught:
        lora_export.merge(base, base, tmp_path / "out")
    assert caught.value.where == str(base) and caught.value.expected == "a PEFT adapter folder"
    assert not (tmp_path / "out").exists()
    with pytest.raises(LoraExportError, match="no such folder"):
        lora_export.export(tmp_path / "none", tmp_path / "out")
    with pytest.raises(LoraExportError, match="--shared-as without --graph-from"):
        lora_export.export("no/hub-has-this", tmp_path / "out", options=ExportOptions(shared_as="a"))
    with pytest.raises(LoraExportError, match="--key, --run or --runtime without a package"):
        lora_export.verify(base, options=VerifyOptions(key=tmp_path / "key.pem"))
    with pytest.raises(LoraExportError, match="not a run"):
        lora_export.package(adapter, "genai", tmp_path / "out")


@pytest.mark.slow
def test_api_merge_and_export_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.packages.conftest import save_decoder
    from tests.packages.conftest import save_lora as lora_of

    base = save_decoder(tmp_path / "base")
    adapter = lora_of(base, tmp_path / "adapter", ["q_proj", "v_proj"])
    options = StoryOptions(
        benchmark=BenchmarkOptions(max_seconds=2, shapes=((1, 8),)), export=ExportOptions(provider="cpu")
    )
    story = lora_export.merge_and_export(base, adapter, tmp_path / "run", options)
    assert story.validate and story.validate.passed and story.benchmark
    package = lora_export.package(story.output, "optimum", tmp_path / "package")
    assert lora_export.verify(package.output).verified
    again = lora_export.validate(base, adapter, story.output / "merged", options=ValidationOptions(provider="cpu"))
    assert again.passed
    measured = lora_export.benchmark(
        story.output / "onnx", tmp_path / "latency", base=story.output / "onnx",
        options=BenchmarkOptions(max_seconds=2, shapes=((1, 8),), provider="cpu"),
    )  # fmt: skip
    assert measured.graph_identical
    assert capfd.readouterr().out == ""
