"""Code blocks of README.md and docs/: read by their own parsers every day, and run by `make test-all`."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from lora_export.commands.main import cli
from tests.docs.pages import ROOT, RUN, Block, blocks, name, pages, scenery
from tests.docs.scenery import SCENERIES

ALL = [b for page in pages() for b in blocks(page)]
LANGUAGES = {"text", "bash", "python", "toml", "yaml", "json", "html"}


def of(language: str) -> list[object]:
    found = [b for b in ALL if b.language == language]
    assert found
    return [pytest.param(b, id=f"{name(b.page)}-{i}") for i, b in enumerate(found)]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each call of lora-export in a piece of bash."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if line.endswith("|| test $? -eq 2"):
            continue  # shown because it is wrong
        for i, word in enumerate(words):
            if word == "lora-export" and all("=" in w for w in words[:i]):
                stop = next((j for j, w in enumerate(words) if w in ("||", "&&", ">", "|", ";")), len(words))
                yield words[i + 1 : stop]


def test_block_names_its_language() -> None:
    assert {b.language for b in ALL} <= LANGUAGES, [name(b.page) for b in ALL if b.language not in LANGUAGES]
    assert len(ALL) > 40


@pytest.mark.parametrize("block", of("bash"))
def test_block_commands_use_existing_options(block: Block) -> None:
    for words in commands(block.code):
        if not words:
            continue
        context = cli.make_context("lora-export", list(words[:1]))
        _, command, _ = cli.resolve_command(context, words)
        assert command is not None
        try:
            command.make_context(words[0], words[1:], parent=context)
        except click.BadParameter as error:
            assert "does not exist" in str(error), (words, error)  # a file of the reader


@pytest.mark.parametrize("block", of("python"))
def test_block_python_imports_existing_names(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, a.name) for a in node.names), ast.unparse(node)


def check_workflow(text: str) -> None:
    """A GitHub workflow: every step uses an action of a version or runs something, and our commands are ours."""
    workflow = yaml.safe_load(text)
    assert workflow["name"] and True in workflow  # YAML 1.1 reads the key `on` as true
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    ran = 0
    for step in steps:
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step
        for line in step.get("run", "").splitlines():
            words = shlex.split(line)
            if words[0] == "lora-export":
                command = cli.commands[words[1]]
                command.make_context(words[1], words[2:], resilient_parsing=False)
                ran += 1
    assert ran and len(steps) > 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("merge-and-export", "merge-or-export"), ("--max-time", "--longest-time"),
        ("actions/checkout@v4", "checkout"),
        ("on: [pull_request]", ""), ("- run: lora-export", "- ran: lora-export"),
    ],
)  # fmt: skip
def test_block_broken_workflow_is_found(old: str, new: str) -> None:
    (block,) = (b for b in ALL if b.language == "yaml")
    assert old in block.code
    with pytest.raises((AssertionError, KeyError, click.UsageError)):
        check_workflow(block.code.replace(old, new))


@pytest.mark.parametrize("block", of("toml") + of("yaml"))
def test_block_files_parse(block: Block, tmp_path: Path) -> None:
    if block.language == "yaml":
        check_workflow(block.code)
        return
    assert tomllib.loads(block.code)
    if "lora-export" not in block.code:
        from lora_export.commands import configuration

        (tmp_path / configuration.FILE).write_text(block.code)
        found = configuration.read(tmp_path)
        assert found is not None
        configuration.refuse_unknown(cli, *found)
        assert configuration.defaults(cli.commands["merge"], "merge", *found)["max_shard_size"] == "5GB"


def runnable() -> list[object]:
    found = [p for p in pages() if any(b.language in RUN and not b.not_run for b in blocks(p))]
    return [pytest.param(p, id=name(p)) for p in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable())
def test_page_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    SCENERIES[scenery(page) or "checkout"](tmp_path)
    script = ["set -euo pipefail", "export LC_ALL=C.UTF-8"]
    for block in blocks(page):
        if block.not_run or block.language not in RUN:
            continue
        code = block.code if block.language == "bash" else f"python -c {shlex.quote(block.code)}\n"
        script.append(code + 'if [ -n "${BASE:-}" ]; then export BASE; fi')
    file = tmp_path / "page.sh"
    file.write_text("\n".join(script))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "LORA_EXPORT_CACHE": os.environ.get("LORA_EXPORT_CACHE", str(ROOT / ".cache")),
    }
    done = subprocess.run(
        ["bash", str(file)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_block_json_parses() -> None:
    for block in ALL:
        if block.language == "json":
            json.loads(block.code)
