"""Names from files cannot write on a terminal, and paths that are no UTF-8 are refused by every command."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from lora_export.checkpoint.sources import resolve
from lora_export.commands.main import cli
from lora_export.commands.talk import Talk, table
from lora_export.commands.words import interference_lines
from lora_export.contracts import Interference
from lora_export.errors import InputError
from lora_export.progress import Console
from lora_export.storage import sealed

EVIL = "w\x1b[2J\n  try:      rm -rf /\u202e"
SHOWN = "w\\x1b[2J\\n  try:      rm -rf /\\u202e"


def test_dry_run_escapes_names(tmp_path: Path) -> None:
    """A base and a LoRA, one of whose weights has a name that would clear the screen and add a line."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    name = "layers.0.\x1b[2J\nproj"
    for folder in (base, adapter):
        folder.mkdir()
    save_file({f"{name}.weight": torch.ones(4, 4)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    factors = {
        f"base_model.model.{name}.lora_{x}.weight": torch.ones(*s) for x, s in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    words = ["merge", "-b", str(base), "-a", str(adapter), "-o", str(tmp_path / "out"), "--dry-run"]
    found = CliRunner().invoke(cli, words)
    assert found.exit_code == 0, found.output
    assert "layers.0.\\x1b[2J\\nproj.weight" in found.stdout
    assert "\x1b" not in found.output and "\nproj" not in found.output


def test_output_escapes_names(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [Interference(tensor, EVIL, "b", 0.1, 0.5, 1.0) for tensor in (None, EVIL)]
    lines = interference_lines(pairs)
    assert len(lines) == 3 and SHOWN in lines[1] and SHOWN in lines[2]
    assert table([("name", EVIL), (EVIL, "")]).count("\n") == 1
    Talk(Console(), as_json=False).result({}, "first\nsecond \x1b[2J\u202e")
    console = Console(1)
    for say in (console.stage, console.detail, console.warn):
        say(EVIL)
    out, err = capsys.readouterr()
    assert out == "first\nsecond \\x1b[2J\\u202e\n"
    assert err.count("\n") == err.count(SHOWN) == 3


ODD = os.fsdecode(b"b\xff\xfease")
OTHER = {"-b": "base", "-a": "adapter", "-m": "base", "-o": "out", "--from": "adapter", "--to": "adapter"}
COMMANDS = {
    "inspect": ("PATH",), "merge": ("-b", "-a", "-o"), "validate": ("-b", "-a", "-m"), "export": ("-m", "-o"),
    "merge-and-export": ("-b", "-a", "-o"), "benchmark": ("-m", "-o"), "report": ("PATH",),
    "verify": ("PATH",), "combine": ("-a", "-o"), "truncate": ("-a", "-o"), "extract": ("-b", "-m", "-o"),
    "switch": ("-m", "-b"), "package": ("PATH", "-o"), "fleet": ("PATH", "-o"),
}  # fmt: skip
MORE = {"package": ("--for", "hf"), "truncate": ("--rank", "2"), "extract": ("--rank", "2")}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("base", "adapter", ODD):
        (tmp_path / name).mkdir()
    return tmp_path


def test_every_command_is_tested() -> None:
    assert set(COMMANDS) == set(cli.commands) - {"env"}


@pytest.mark.parametrize(("command", "odd"), [(c, o) for c, options in COMMANDS.items() for o in options])
def test_path_not_utf8_is_refused(command: str, odd: str, folders: Path) -> None:
    words = [command, *MORE.get(command, ())]
    for option in COMMANDS[command]:
        name = ODD if option == odd else OTHER.get(option, "base")
        words += [str(folders / name)] if option == "PATH" else [option, str(folders / name)]
    if command == "switch":
        words += ["--from", str(folders / "adapter"), "--to", str(folders / "adapter")]
    found = CliRunner().invoke(cli, words)
    assert found.exit_code == 1, found.output
    assert "the path is not UTF-8" in found.stderr and "b\\udcff\\udcfease" in found.stderr
    assert "internal error" not in found.stderr


def test_link_to_path_not_utf8_is_refused(folders: Path) -> None:
    (folders / "link").symlink_to(folders / ODD)
    with pytest.raises(InputError, match="not UTF-8"):
        resolve(folders / "link")
    found = CliRunner().invoke(cli, ["inspect", str(folders / "link")])
    assert found.exit_code == 1 and "not UTF-8" in found.stderr


def test_json_with_name_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid UTF-8"):
        sealed.write_sealed(tmp_path / "x.json", {"files": {ODD: 1}})
    assert not (tmp_path / "x.json").exists()
