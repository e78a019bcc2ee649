"""Many adapters in one folder: each computes what an export of its own does, and holds only what it changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from lora_export.commands.main import cli
from lora_export.contracts import AdapterChoice, ExportResult
from lora_export.errors import LoraExportError
from lora_export.merging import merge
from lora_export.onnx_export import load_export, model_files, reweight, share
from lora_export.onnx_export.graphs.identity import compare
from lora_export.onnx_export.weights import shared_folder as shared
from lora_export.progress import Silent
from lora_export.workflows.inspection import inspect_folder
from tests.onnx_export.runs import session


def merged(base: Path, folder: Path, targets: list[str], seed: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder / "adapter")
    merge(base, [AdapterChoice(folder / "adapter")], folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module")
def given(
    llama: Path, exported: Callable[..., ExportResult], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A base, two merged models of it, and the base's export in fp32 and int4."""
    folder = tmp_path_factory.mktemp("shared")
    return {
        "base": llama,
        "a": merged(llama, folder / "a", ["q_proj", "v_proj"], 1),
        "b": merged(llama, folder / "b", ["down_proj"], 2),
        "fp32": exported(llama).output,
        "int4": exported(llama, "int4").output,
    }


def logits(graph: Path) -> np.ndarray:
    ids = np.arange(4, 15, dtype=np.int64)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(11)[None]}
    runs = session(graph)
    for given in runs.get_inputs():
        if given.name.startswith("past"):
            feeds[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
    return np.asarray(runs.run(["logits"], {i.name: feeds[i.name] for i in runs.get_inputs()})[0])


def added(given: dict[str, Path], root: Path, name: str, precision: str = "fp32", **how: bool) -> ExportResult:
    return share(given[precision], given[name], root, name, progress=Silent(), **how)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_shared_graph_equals_own_export(precision: str, given: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "all"
    for name in ("a", "b"):
        result = added(given, root, name, precision)
        own = reweight(given[precision], given[name], tmp_path / name, progress=Silent())
        np.testing.assert_array_equal(logits(result.model), logits(own.model))
        assert compare([root / "base.onnx"], [result.model], "cpu").identical
        small, whole = result.files[result.model.with_suffix("").name + ".onnx"], own.files["model.onnx"]
        assert small < 2 * whole
    np.testing.assert_array_equal(logits(root / "base.onnx"), logits(load_export(given[precision]).model))
    assert not np.array_equal(logits(root / "a.onnx"), logits(root / "b.onnx"))


def test_shared_adapter_holds_only_changed_weights(given: dict[str, Path], tmp_path: Path) -> None:
    result = added(given, tmp_path / "all", "b")
    (data,) = (n for n in result.files if n.endswith(".bin"))
    two_down_projections = 2 * 64 * 112 * 4
    assert two_down_projections <= result.files[data] < two_down_projections + 2 * 4096
    places = {
        e.value
        for t in onnx.load(result.model, load_external_data=False).graph.initializer
        for e in t.external_data
        if e.key == "location"
    }
    assert places == {"base.bin", data}


def test_shared_folder_is_export_of_base(given: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "all"
    added(given, root, "a")
    assert load_export(root).graphs == ("base.onnx",)
    assert json.loads((root / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "base.onnx"
    assert model_files(root / "a.onnx") == (root / "a.onnx",)
    assert inspect_folder(root)["adapters"] == ["a"]
    again = share(root, given["b"], root, "b", progress=Silent())  # the graph from the folder itself
    assert sorted(p.name for p in root.iterdir() if p.suffix == ".onnx") == ["a.onnx", "b.onnx", "base.onnx"]
    share(root, given["b"], tmp_path / "another", "b", progress=Silent())
    assert not list((tmp_path / "another").glob("a*"))
    own = reweight(root, given["b"], tmp_path / "own", progress=Silent())
    np.testing.assert_array_equal(logits(again.model), logits(own.model))


def test_shared_adapter_generates_in_genai(given: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime_genai as og

    root = tmp_path / "all"
    added(given, root, "a")

    def tokens(folder: Path, graph: str) -> list[int]:
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"filename": graph}}}))
        model = og.Model(config)
        settings = og.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=20)
        generator = og.Generator(model, settings)
        generator.append_tokens([5, 9, 20])
        while not generator.is_done():
            generator.generate_next_token()
        return list(generator.get_sequence(0))

    own = reweight(given["fp32"], given["a"], tmp_path / "own", progress=Silent())
    assert tokens(root, "a.onnx") == tokens(own.output, "model.onnx")


def test_shared_adapter_is_replaced_only_by_force(given: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "all"
    added(given, root, "a")
    before = {p.name: p.read_bytes() for p in root.iterdir()}
    with pytest.raises(LoraExportError, match="has an adapter called a"):
        share(given["fp32"], given["b"], root, "a", progress=Silent())
    assert {p.name: p.read_bytes() for p in root.iterdir()} == before
    share(given["fp32"], given["b"], root, "a", force=True, progress=Silent())
    assert len(list(root.glob("a-*.bin"))) == 1
    own = reweight(given["fp32"], given["b"], tmp_path / "own", progress=Silent())
    np.testing.assert_array_equal(logits(root / "a.onnx"), logits(own.model))


def test_shared_failure_keeps_folder(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "all"
    added(given, root, "a")
    before = {p.name: p.read_bytes() for p in root.iterdir()}

    def broken(*_: object) -> None:
        raise LoraExportError("no")

    monkeypatch.setattr(shared, "check_loads", broken)
    with pytest.raises(LoraExportError):
        share(given["fp32"], given["b"], root, "a", force=True, progress=Silent())
    with pytest.raises(LoraExportError):
        share(given["fp32"], given["b"], tmp_path / "other", "b", progress=Silent())
    assert {p.name: p.read_bytes() for p in root.iterdir()} == before
    assert not (tmp_path / "other").exists()


def test_shared_other_base_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "all"
    added(given, root, "a")
    reweight(given["fp32"], given["a"], tmp_path / "other-onnx", progress=Silent())
    with pytest.raises(LoraExportError, match="shares another base"):
        share(tmp_path / "other-onnx", given["b"], root, "b", progress=Silent())
    assert sorted(p.name for p in root.glob("*.onnx")) == ["a.onnx", "base.onnx"]


@pytest.mark.parametrize("name", ["", "base", "../a", "a/b", "a b", ".a", "-a", "a.b", "Ä", "a" * 65])
def test_shared_invalid_name_is_refused(name: str, given: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LoraExportError, match="cannot be called"):
        share(given["fp32"], given["a"], tmp_path / "all", name, progress=Silent())
    assert not list(tmp_path.iterdir())


def test_shared_foreign_folder_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    with pytest.raises(LoraExportError, match="something else than adapters"):
        share(given["fp32"], given["a"], root, "a", force=True, progress=Silent())
    assert [p.name for p in root.iterdir()] == ["notes.txt"]


def test_shared_other_chat_template_is_reported(
    given: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(given["a"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("other")
    command = ["export", "-m", tmp_path / "model", "-o", tmp_path / "all", "--graph-from", given["fp32"]]
    found = CliRunner().invoke(cli, [*map(str, command), "--shared-as", "a", "--json"])
    assert found.exit_code == 0, found.stderr
    assert "chat_template.jinja" in found.stderr
    document = json.loads(found.stdout)
    assert document["graphs"] == ["a.onnx"] and "a.onnx" in document["files"]


def test_shared_as_without_graph_from_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", "-m", given["a"], "-o", tmp_path / "all", "--shared-as", "a"]
    found = CliRunner().invoke(cli, [*map(str, command)])
    assert found.exit_code == 1 and "--shared-as without --graph-from" in found.stderr
