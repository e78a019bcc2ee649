"""One graph and many adapters beside it, against PEFT's unmerged model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_export.commands.main import cli
from lora_export.contracts import ExportOptions, ExportResult
from lora_export.errors import LoraExportError
from lora_export.progress import Silent
from lora_export.workflows.inspection import inspect_folder
from lora_export.workflows.pluggable import export_pluggable
from tests.onnx_export.conftest import save_llama

IDS = torch.arange(4, 17)[None]


def save_lora(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and adapters of other ranks, modules and scalings."""
    folder = tmp_path_factory.mktemp("pluggable")
    base = save_llama(folder / "base", seed=4)
    return {
        "base": base,
        "plain": save_lora(base, folder / "plain", 1, target_modules=["q_proj", "v_proj"]),
        "wide": save_lora(
            base, folder / "wide", 2, r=12, use_rslora=True, target_modules=["o_proj", "gate_proj", "up_proj"]
        ),
        "odd": save_lora(
            base, folder / "odd", 3, target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 20},
        ),
    }  # fmt: skip


def plugged(given: dict[str, Path], names: Sequence[str], output: Path, **how: Any) -> ExportResult:
    return export_pluggable(
        given["base"],
        [given[n] for n in names],
        output,
        ExportOptions(**{"precision": "fp32", "provider": "cpu", **how}),
        Silent(),
    )


@pytest.fixture(scope="module")
def exported(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return plugged(given, ("plain", "wide", "odd"), tmp_path_factory.mktemp("exported") / "out")


def onnx_logits(result: ExportResult, adapter: str | None) -> np.ndarray:
    options, run = ort.SessionOptions(), ort.RunOptions()
    session = ort.InferenceSession(str(result.model), options, providers=["CPUExecutionProvider"])
    loaded = ort.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(result.output / f"{adapter}.onnx_adapter"))
        run.add_active_adapter(loaded)
    ids = IDS.numpy()
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for given in session.get_inputs():
        if given.name.startswith("past"):
            feeds[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
    return np.asarray(session.run(["logits"], feeds, run)[0])


def peft_logits(given: dict[str, Path], adapter: str | None) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(given[adapter]))
    with torch.no_grad():
        return np.asarray(model.eval()(IDS).logits.numpy())


@pytest.mark.parametrize("adapter", [None, "plain", "wide", "odd"])
def test_pluggable_adapter_matches_peft(
    adapter: str | None, given: dict[str, Path], exported: ExportResult
) -> None:
    expected, found = peft_logits(given, adapter), onnx_logits(exported, adapter)
    assert np.abs(expected - found).max() <= 1e-4 * np.abs(expected).max()
    if adapter is not None:
        assert np.abs(expected - peft_logits(given, None)).max() > 0.1


def test_pluggable_adapters_switch_in_genai(exported: ExportResult, given: dict[str, Path]) -> None:
    import onnxruntime_genai as og

    model = og.Model(str(exported.output))
    adapters = og.Adapters(model)
    for name in ("plain", "odd"):
        adapters.load(str(exported.output / f"{name}.onnx_adapter"), name)

    def first(name: str | None) -> np.ndarray:
        settings = og.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=40)
        generator = og.Generator(model, settings)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(IDS[0].tolist())
        return np.asarray(generator.get_logits()).reshape(-1)

    for name in ("plain", "odd", None, "plain"):
        expected = peft_logits(given, name)[0, -1]
        assert np.abs(first(name) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_pluggable_export_writes_files(exported: ExportResult) -> None:
    names = {p.name for p in exported.output.iterdir()}
    assert {"plain.onnx_adapter", "wide.onnx_adapter", "odd.onnx_adapter", "model.onnx"} <= names
    record = json.loads((exported.output / "export.json").read_text())
    assert inspect_folder(exported.output)["adapters"] == ["odd", "plain", "wide"]
    assert record["pluggable"] == ["plain", "wide", "odd"]
    graph = onnx.load(exported.model, load_external_data=False).graph
    slots = {i.name for i in graph.input if "lora" in i.name}
    assert len(slots) == 2 * 2 * 6  # two layers, A and B, six of seven projections
    parameters = ort.AdapterFormat.read_adapter(str(exported.output / "plain.onnx_adapter")).get_parameters()
    assert len(parameters) == 2 * 2 * 2 and parameters.keys() <= slots


@pytest.mark.slow
def test_pluggable_half_precision_adapter_has_graph_type(given: dict[str, Path], tmp_path: Path) -> None:
    result = plugged(given, ("plain",), tmp_path / "out", precision="fp16")
    parameters = ort.AdapterFormat.read_adapter(str(result.output / "plain.onnx_adapter")).get_parameters()
    assert {v.data_type() for v in parameters.values()} == {"tensor(float16)"}


def test_pluggable_non_lora_adapter_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    dora = save_lora(given["base"], tmp_path / "dora", 5, use_dora=True, target_modules=["q_proj"])
    tokens = save_lora(
        given["base"], tmp_path / "tokens", 6, target_modules=["q_proj"], trainable_token_indices=[5]
    )
    for adapter, word in ((dora, "dora"), (tokens, "embed_tokens")):
        with pytest.raises(LoraExportError, match=word):
            plugged(given | {"odd": adapter}, ("odd",), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pluggable_duplicate_names_are_refused(given: dict[str, Path], tmp_path: Path) -> None:
    other = save_lora(given["base"], tmp_path / "plain", 7, target_modules=["q_proj"])
    with pytest.raises(LoraExportError, match="2 adapters would be written as 'plain'"):
        plugged(given | {"odd": other}, ("plain", "odd"), tmp_path / "out")


def test_pluggable_unfitting_options_are_refused(given: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", "-m", given["base"], "-a", given["plain"], "-o", tmp_path / "out"]
    found = CliRunner().invoke(cli, [*map(str, command), "--keep", "*down_proj*"])
    assert found.exit_code == 1 and "--keep with --precision fp32" in found.stderr


def test_pluggable_quantized_graph_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", "-m", given["base"], "-a", given["plain"], "-o", tmp_path / "out", "--precision", "int4"]
    found = CliRunner().invoke(cli, [*map(str, command)])
    assert found.exit_code == 1 and "merge-and-export --precision int4" in found.stderr
    assert not (tmp_path / "out").exists()
