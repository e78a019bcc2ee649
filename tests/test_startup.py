"""--help answers at once: nothing heavy is imported, and it costs little more than click itself."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "peft", "numpy", "scipy", "safetensors", "bitsandbytes"}
COMMANDS = [
    "merge-and-export",
    "inspect",
    "merge",
    "validate",
    "export",
    "benchmark",
    "package",
    "fleet",
    "switch",
    "combine",
    "extract",
    "truncate",
    "report",
    "verify",
    "env",
]
ASK = """
import json, sys
from lora_export.commands.main import cli
try:
    cli(sys.argv[1:], prog_name="lora-export")
except SystemExit as end:
    print("\\n" + json.dumps({"code": end.code, "modules": sorted({m.partition(".")[0] for m in sys.modules})}))
"""


def ask(*arguments: str) -> tuple[str, dict[str, object]]:
    done = subprocess.run([sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=True)
    text, _, last = done.stdout.rstrip().rpartition("\n")
    return text, json.loads(last)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([c, "--help"] for c in COMMANDS)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    _, found = ask(*arguments)
    assert isinstance(found["modules"], list)
    assert not HEAVY & set(found["modules"])
    assert found["code"] == (0 if arguments else 2)


def test_help_lists_every_command() -> None:
    text, _ = ask("--help")
    assert [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.strip()] == COMMANDS


@pytest.mark.timing
def test_help_is_nearly_as_fast_as_empty_click_program(tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.write_text("import click\n@click.group()\ndef cli(): ...\ncli(['--help'])\n")
    ours = tmp_path / "ours.py"
    ours.write_text("from lora_export.commands.main import cli\ncli(['--help'])\n")
    times: dict[Path, list[float]] = {empty: [], ours: []}
    for _ in range(7):
        for path, samples in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, str(path)], capture_output=True, check=True)
            samples.append(time.perf_counter() - start)
    pairs = zip(times[ours], times[empty], strict=True)
    assert statistics.median(a / b for a, b in pairs) < 1.5, times
