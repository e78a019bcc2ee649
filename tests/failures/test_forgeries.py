"""Fifty seeded forgeries of a run, sealed anew: `verify` notices each, or says what it did not check."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_export import manifest
from lora_export.contracts import AdapterChoice, ExportOptions, Source, StoryOptions
from lora_export.contracts.option import kept
from lora_export.onnx_export.engines import isolated
from lora_export.progress import Silent
from lora_export.workflows.run_graphs import export_as, export_merged
from tests.daily import daily
from tests.failures.commands import invoke
from tests.failures.forgeries import SEEDS, Run, forge, forger_of
from tests.validation.conftest import save_adapter, save_base

DAILY = (1, 2, 4, 6, 8, 15, 17, 19)
Built = dict[str, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Folders in which an engine left what it makes, by the request without its paths: a build takes seconds."""
    return {}


@pytest.fixture(autouse=True)
def engine_once(built: Built, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine runs once for each request: it gets the same model each time."""
    original = isolated.Worker.run

    def run(self: isolated.Worker, module: str, request: Mapping[str, Any], *, engine: str) -> None:
        key = json.dumps({k: v for k, v in request.items() if k not in ("model", "output")})
        if key not in built:
            original(self, module, request, engine=engine)
            built[key] = tmp_path_factory.mktemp("built")
            shutil.copytree(request["output"], built[key], dirs_exist_ok=True)
        shutil.copytree(built[key], request["output"], dirs_exist_ok=True)

    monkeypatch.setattr(isolated.Worker, "run", run)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter and run: two shards in bf16, a chat template, an int4 export; without report and benchmark."""
    root = tmp_path_factory.mktemp("forgeries")
    model = AutoModelForCausalLM.from_pretrained(save_base(root / "one", torch.bfloat16), dtype=torch.bfloat16)
    shutil.copytree(root / "one", root / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(root / "base", max_shard_size="80KB")
    (root / "base" / "chat_template.jinja").write_text("{{ x }}")
    save_adapter(root / "base", root / "adapter")
    (root / "run").mkdir()
    options = StoryOptions(export=ExportOptions("int4", "cpu"))
    words = ("merge", "-b", root / "base", "-a", root / "adapter", "-o", root / "run" / "merged")
    assert invoke(*words).exit_code == 0
    of_base = export_as(root / "base", root / "base-onnx", options.export, Silent(), "the base")
    export_merged(of_base, root / "run" / "merged", root / "run" / "onnx", options.export, Silent())
    manifest.write(root / "run", Source("base", root / "base"), [AdapterChoice(root / "adapter")], kept(options))
    return root


def verify(made: Path, run: Path, *more: object, inputs: bool = True) -> tuple[int, dict[str, Any]]:
    given = ["-b", made / "base", "-a", made / "adapter"] if inputs else []
    result = invoke("verify", run, *given, "--json", *more)
    assert "Traceback" not in result.output and "internal error" not in result.output, result.output
    return result.exit_code, json.loads(result.stdout)


def failed(document: dict[str, Any]) -> list[str]:
    return [f"{c['name']}: {c['note']}" for c in document["checks"] if not c["passed"]]


def test_verify_honest_run_names_what_is_not_checked(made: Path) -> None:
    code, document = verify(made, made / "run")
    assert (code, failed(document)) == (0, [])
    for text in ("the ONNX graph", "the weights", "tokenizer"):
        assert text not in document["verdict"]
    code, document = verify(made, made / "run", "--no-graph")
    assert (code, failed(document)) == (0, []) and "the ONNX graph" in document["verdict"]


@pytest.mark.parametrize("seed", daily(SEEDS, DAILY), ids=lambda seed: f"{seed}-{forger_of(seed).__name__}")
def test_verify_forged_run_is_noticed_or_named(made: Path, tmp_path: Path, seed: int) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    unknown = forge(Run(tmp_path / "run", made / "base"), seed)
    code, document = verify(made, tmp_path / "run")
    assert code == 3 and failed(document), document["verdict"]
    code, document = verify(made, tmp_path / "run", inputs=False)
    assert code == 3 or unknown in document["verdict"], document["verdict"]


def test_verify_run_with_base_weights_in_graph_fails(made: Path, tmp_path: Path) -> None:
    """The export of the bare base, with the hashes of the merged tensors in its map."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copyfile(made / "base-onnx" / "model.onnx.data", tmp_path / "run" / "onnx" / "model.onnx.data")
    Run(tmp_path / "run", made / "base").reseal()
    code, document = verify(made, tmp_path / "run")
    assert code == 3 and any("onnx_weights" in f and "qkv_proj" in f for f in failed(document)), failed(document)
