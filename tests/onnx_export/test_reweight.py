"""The next adapter of an exported graph: byte for byte a fresh export, or a refusal with nothing written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner

from lora_export.checkpoint import hashing
from lora_export.choices import Precision
from lora_export.commands.main import cli
from lora_export.contracts import AdapterChoice, ExportOptions, ExportResult, QuantizationOptions
from lora_export.errors import LoraExportError
from lora_export.merging import merge, written_source
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from lora_export.storage import workers
from tests.builders import edit_json, edit_tensors
from tests.onnx_export.architectures import DYNAMO, GENAI, save, save_adapter

Folders = tuple[Path, Path, Path]
Exported = Callable[..., ExportResult]


def same_files(a: Path, b: Path) -> None:
    """All but the record, which tells the time."""
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    for name in (n for n in names if n != "export.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The base and a merged model of an architecture."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            architecture = (DYNAMO | GENAI)[name]
            base = save(architecture, folder / "base")
            save_adapter(architecture, base, folder / "adapter")
            merge(base, [AdapterChoice(folder / "adapter")], folder / "merged")
            made[name] = base, folder / "merged"
        return made[name]

    return get


PLAIN = QuantizationOptions()
Case = tuple[str, Precision, QuantizationOptions]
QUICK: list[Case] = [("LlamaForCausalLM", "int4", PLAIN)]
SLOW: list[Case] = [
    *(("LlamaForCausalLM", p, PLAIN) for p in ("fp32", "fp16", "bf16", "int8")),
    *(("LlamaForCausalLM", "int4", QuantizationOptions(16, algorithm=a)) for a in ("rtn", "k_quant")),
    ("LlamaForCausalLM", "int4", QuantizationOptions(keep=("*down_proj*",))),
    *(("Qwen3ForCausalLM", p, PLAIN) for p in ("fp16", "int4")),
    *(("GPT2LMHeadModel", p, PLAIN) for p in ("fp32", "fp16", "int4", "nf4")),
    *(("BertModel", p, PLAIN) for p in ("fp32", "fp16", "int8")),
    ("T5ForConditionalGeneration", "int4", PLAIN),
    ("ViTForImageClassification", "fp16", PLAIN),
]  # fmt: skip
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "precision", "how"), CASES)
def test_reweight_equals_fresh_export(
    name: str, precision: Precision, how: QuantizationOptions, models: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:  # fmt: skip
    base, merged = models(name)

    def fresh(model: Path, output: str) -> ExportResult:
        provider = "cuda" if precision == "bf16" else "cpu"  # the CPU has no bf16; a graph can be made anywhere
        return export(
            model, tmp_path / output, ExportOptions(precision, provider, quantization=how), progress=Silent()
        )

    earlier, wanted = fresh(base, "earlier"), fresh(merged, "wanted")
    found = reweight(earlier.output, merged, tmp_path / "found", progress=Silent())
    same_files(wanted.output, found.output)
    graphs = [p.name for p in earlier.paths]
    for graph in graphs:
        assert (found.output / graph).read_bytes() == (earlier.output / graph).read_bytes()
    data = [p.name for p in found.output.iterdir() if "data" in p.name]
    assert any((found.output / n).read_bytes() != (earlier.output / n).read_bytes() for n in data)
    # and back: the base again, from the graph of a merged model
    back = reweight(found.output, base, tmp_path / "back", progress=Silent())
    same_files(earlier.output, back.output)


def test_reweight_fresh_merge_hashes_no_tensor_again(
    exported: Exported, llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = merge(llama, [AdapterChoice(adapter)], tmp_path / "merged")
    earlier = exported(llama).output
    wanted = reweight(earlier, result.output, tmp_path / "wanted", progress=Silent())
    monkeypatch.setattr(hashing, "hash_tensor", lambda info: pytest.fail(f"{info.name} was hashed again"))
    found = reweight(earlier, result.output, tmp_path / "out", source=written_source(result), progress=Silent())
    same_files(wanted.output, found.output)
    with pytest.raises(pytest.fail.Exception):
        reweight(earlier, result.output, tmp_path / "other", progress=Silent())


@pytest.mark.slow
def test_reweight_follows_end_of_adapters_tokenizer(
    exported: Exported, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    """genai_config.json is not the base's any more, and byte for byte a fresh export's; the graph is the base's."""
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, own / name)
    edit_json(own / "tokenizer_config.json", eos_token="<unk>")
    merge(llama, [AdapterChoice(own)], tmp_path / "merged")
    earlier = exported(llama).output
    found = reweight(earlier, tmp_path / "merged", tmp_path / "found", progress=Silent())
    wanted = export(tmp_path / "merged", tmp_path / "wanted", ExportOptions("fp32", "cpu"), progress=Silent())
    same_files(wanted.output, found.output)
    ends = [
        json.loads((f / "genai_config.json").read_text())["model"]["eos_token_id"] for f in (earlier, found.output)
    ]
    assert ends == [2, [0, 2]]


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_llama(llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "llama"
    merge(llama, [AdapterChoice(adapter)], output)
    return output


@pytest.fixture
def folders(exported: Exported, llama: Path, merged_llama: Path, tmp_path: Path) -> Folders:
    """An export of the base and a merged model, both to be spoiled; and where the next export is to lie."""
    shutil.copytree(merged_llama, tmp_path / "merged")
    shutil.copytree(exported(llama).output, tmp_path / "earlier")
    return tmp_path / "earlier", tmp_path / "merged", tmp_path / "out"


def refused(folders: Folders, *words: str) -> None:
    """The words are in the message, there is no output, and nothing beside it that was not there."""
    earlier, merged, out = folders
    before = sorted(p.name for p in out.parent.iterdir() if not p.name.startswith("."))
    with pytest.raises((LoraExportError, OSError)) as raised:
        reweight(earlier, merged, out, progress=Silent())
    for word in words:
        assert word in str(raised.value), raised.value
    assert sorted(p.name for p in out.parent.iterdir() if not p.name.startswith(".")) == before
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".out") and p.is_dir()]


def test_reweight_other_config_is_refused(folders: Folders) -> None:
    edit_json(folders[1] / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    refused(folders, "config.json is another", "without --graph-from")


def test_reweight_missing_or_extra_tensor_is_refused(folders: Folders) -> None:
    weights = folders[1] / "model.safetensors"
    edit_tensors(weights, {"model.more.weight": torch.ones(3)})
    refused(folders, "only this model has the tensor", "model.more.weight")
    edit_tensors(weights, {"model.more.weight": None, "model.norm.weight": None})
    refused(folders, "only the exported model has the tensor", "model.norm.weight")


def test_reweight_other_shape_is_refused(folders: Folders) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folders[1] / "model.safetensors", {name: torch.ones(96, 64)})
    refused(folders, name, "a model of the same shape")


def test_reweight_changed_tensor_without_recipe_is_refused(exported: Exported, bert: Path, tmp_path: Path) -> None:
    """The graph lacks the pooler; a bias of zeros may be lacking too, and then no other could come in."""
    shutil.copytree(bert, tmp_path / "merged")
    edit_tensors(tmp_path / "merged" / "model.safetensors", {"pooler.dense.bias": torch.ones(64)})
    refused((exported(bert).output, tmp_path / "merged", tmp_path / "out"), "it changed", "pooler.dense.bias")


def test_reweight_truncated_data_file_is_refused(folders: Folders) -> None:
    data = folders[0] / "model.onnx.data"
    os.truncate(data, data.stat().st_size - 1)
    refused(folders, "model.onnx.data")


def test_reweight_planted_link_is_refused(folders: Folders, tmp_path: Path) -> None:
    data = folders[0] / "model.onnx.data"
    secret = tmp_path / "secret"
    data.rename(secret)
    before = secret.read_bytes()
    data.symlink_to(secret)
    refused(folders, "link")
    data.unlink()
    os.link(secret, data)
    refused(folders, "link")
    assert secret.read_bytes() == before


def test_reweight_link_as_graph_is_refused(folders: Folders, tmp_path: Path) -> None:
    graph = folders[0] / "genai_config.json"
    (tmp_path / "elsewhere.json").write_bytes(graph.read_bytes())
    graph.unlink()
    graph.symlink_to(tmp_path / "elsewhere.json")
    refused(folders, "genai_config.json")


def test_reweight_graph_disagreeing_with_map_is_refused(folders: Folders) -> None:
    path = folders[0] / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = "256"
    path.write_bytes(model.SerializeToString())
    refused(folders, "disagree on where", tensor.name)


def test_reweight_from_unmerged_export_is_refused(
    exported: Exported, llama: Path, adapter: Path, folders: Folders
) -> None:
    refused((exported(llama, adapter=adapter).output, *folders[1:]), "no weights-map.json")


def test_reweight_full_disk_leaves_nothing(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workers.OpenFile, "write_lines", full)
    refused(folders, "full")


def test_reweight_too_little_space_is_refused_first(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Usage:
        free: int = 10_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    refused(folders, "are needed and 10,000 bytes are free")


@pytest.mark.parametrize("option", [["--precision", "fp16"], ["--engine", "genai"], ["--keep", "auto"]])
def test_reweight_graph_options_are_refused(option: list[str], folders: Folders) -> None:
    earlier, merged, out = map(str, folders)
    command = ["export", "-m", merged, "-o", out, "--graph-from", earlier, *option, "--json"]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 1
    assert f"{option[0]} with --graph-from" in found.stderr
    assert not folders[2].exists()


def test_export_graph_from_command_reports_result(folders: Folders) -> None:
    earlier, merged, out = map(str, folders)
    found = CliRunner().invoke(cli, ["export", "-m", merged, "-o", out, "--graph-from", earlier, "--json"])
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["engine"] == "genai" and document["precision"] == "fp32"
    assert document["files"]["model.onnx.data"] == (folders[2] / "model.onnx.data").stat().st_size
