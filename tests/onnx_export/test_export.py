"""What an exported folder holds, and what is refused before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from lora_export.contracts import ExportOptions, ExportResult, QuantizationOptions
from lora_export.errors import AdapterError, CheckpointError, ExportError, InputError
from lora_export.onnx_export import export, load_export, reweight
from lora_export.onnx_export.engines import choose, isolated
from lora_export.progress import Silent
from lora_export.storage import sealed

ModelWith = Callable[[dict[str, Any]], Path]


def attempt(model: Path, output: Path, adapter: Path | None = None, **options: Any) -> ExportResult:
    chosen = ExportOptions(**{"precision": "fp32", "provider": "cpu", **options})
    return export(model, output, chosen, adapter=adapter, progress=Silent())


def test_export_writes_companions_and_record(exported: Callable[..., ExportResult], llama: Path) -> None:
    result = exported(llama)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (result.output / name).read_bytes() == (llama / name).read_bytes(), name
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(result.files)
    record = json.loads((result.output / "export.json").read_text())
    assert record["source_config_sha256"] == sealed.sha256(llama / "config.json")
    assert {"onnxruntime_genai", "onnx", "torch", "transformers"} <= set(record["versions"])
    assert load_export(result.output) == result
    assert json.loads((result.output / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_export_fp16_for_cpu_names_no_cuda_provider(exported: Callable[..., ExportResult], llama: Path) -> None:
    assert "cuda" not in (exported(llama, "fp16").output / "genai_config.json").read_text()


def test_export_folder_generates_in_genai(exported: Callable[..., ExportResult], llama: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(exported(llama).output))
    ids = [ord("a") - ord("!") + 4, ord("b") - ord("!") + 4]
    assert list(og.Tokenizer(model).encode("ab")) == ids
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=8)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 3


def test_load_export_of_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no export"):
        load_export(tmp_path)


def test_choose_engine_follows_architecture() -> None:
    assert choose({"architectures": ["Qwen2ForCausalLM"]}).name == "genai"
    assert choose({"architectures": ["BertForSequenceClassification"]}).name == "dynamo"


def test_export_unknown_architecture_is_refused() -> None:
    with pytest.raises(ExportError, match=r"WeirdForCausalLM.*'weird'") as refusal:
        choose({"architectures": ["WeirdForCausalLM"], "model_type": "weird"})
    assert "LlamaForCausalLM" in str(refusal.value)


def test_export_with_wrong_engine_is_refused() -> None:
    with pytest.raises(ExportError, match="genai does not export BertModel"):
        choose({"architectures": ["BertModel"]}, "genai")
    with pytest.raises(ExportError, match="unknown engine 'magic'"):
        choose({"architectures": ["LlamaForCausalLM"]}, "magic")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"transformers_version": "99.0.1"}, "saved by transformers 99.0.1"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "still has a quantization_config"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "'auto_map'"),
        ({"text_config": {"auto_map": {"AutoModel": "modeling_x.X"}}}, "'auto_map'"),
        ({"_attn_implementation_internal": "x/y"}, "'_attn_implementation_internal'"),
    ],
)
def test_export_unsafe_config_is_refused(
    model_with: ModelWith, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        attempt(model_with(changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_ambiguous_vocabulary_is_refused(model_with: ModelWith, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="vocab_size and intermediate_size are both 112"):
        attempt(model_with({"vocab_size": 112}), tmp_path / "out", engine="genai")


def test_export_decoder_without_tokenizer_is_refused(model_with: ModelWith, tmp_path: Path) -> None:
    model = model_with({})
    (model / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match="has no tokenizer"):
        attempt(model, tmp_path / "out", engine="genai")


def test_export_pickled_weights_is_refused(model_with: ModelWith, tmp_path: Path) -> None:
    model = model_with({})
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        attempt(model, tmp_path / "out")


def test_export_impossible_precision_is_refused(llama: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bf16 does not run on the CPU"):
        attempt(llama, tmp_path / "out", precision="bf16")
    with pytest.raises(ExportError, match="bf16 does not run on the CPU"):
        attempt(bert, tmp_path / "out", precision="bf16")
    with pytest.raises(ExportError, match="does not export nf4"):
        attempt(llama, tmp_path / "out", precision="nf4", engine="genai")
    with pytest.raises(ExportError, match="provider 'tensorrt'"):
        attempt(llama, tmp_path / "out", provider="tensorrt", engine="genai")


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}],
)
def test_export_unmerged_unsupported_adapter_is_refused(
    llama: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changed = tmp_path / "adapter"
    shutil.copytree(adapter, changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ExportError, match=next(iter(changes))):
        attempt(llama, tmp_path / "out", adapter=changed)


def test_export_pickled_adapter_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    changed = tmp_path / "adapter"
    shutil.copytree(adapter, changed)
    (changed / "adapter_model.safetensors").rename(changed / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        attempt(llama, tmp_path / "out", adapter=changed)


def test_export_engine_failure_has_no_traceback(model_with: ModelWith, tmp_path: Path) -> None:
    model = model_with({})
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ExportError, match="engine genai failed") as failure:
        attempt(model, tmp_path / "out", engine="genai")
    assert "SafetensorError" in str(failure.value)
    assert "Traceback" not in str(failure.value)
    assert 'File "' not in str(failure.value)
    assert not (tmp_path / "out").exists()


def test_export_engine_sees_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    environment = isolated._environment("/nowhere")
    assert "HF_TOKEN" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_export_keep_touched_makes_those_products_int8(llama: Path, tmp_path: Path) -> None:
    """A norm that an adapter changed is no product, and a pattern of tensors is found in any graph."""
    changed = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    how = QuantizationOptions(keep=("touched", "*layers.0.mlp.up_proj.weight"), touched=changed)
    for engine in ("genai", "dynamo"):
        made = attempt(llama, tmp_path / engine, precision="int4", quantization=how, engine=engine)
        weights = json.loads((made.output / "weights-map.json").read_text())["weights"]
        bits = {w["made_of"][0]["tensor"]: w.get("quantized", {}).get("method") for w in weights if w["made_of"]}
        assert {t for t, method in bits.items() if method == "int8"} == {changed[0]}, engine
        assert bits["model.layers.0.mlp.up_proj.weight"] is None
        assert bits["model.layers.1.mlp.up_proj.weight"] == "int4"
    with pytest.raises(ExportError, match="nothing says which tensors") as refusal:
        attempt(llama, tmp_path / "out", precision="int4", quantization=QuantizationOptions(keep=("touched",)))
    assert "merge-and-export" in str(refusal.value)


def test_export_keep_auto_makes_worst_products_int8(llama: Path, bert: Path, tmp_path: Path) -> None:
    """What was chosen is in the record, and the folder has nothing of what it was measured on."""
    options = QuantizationOptions(keep=("auto",))
    result = attempt(llama, tmp_path / "out", precision="int4", quantization=options)
    how = json.loads((result.output / "export.json").read_text())["quantization"]
    assert how["keep"] == [] and how["eight_bits"]
    graph = onnx.load(result.model, load_external_data=False).graph
    bits = {n.name: a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
    assert 0 < sum(b == 8 for b in bits.values()) < len(bits)
    assert not [p for p in result.output.iterdir() if p.name.startswith(".")]
    again = reweight(result.output, llama, tmp_path / "again", progress=Silent())
    assert again.model.with_suffix(".onnx.data").read_bytes() == result.model.with_suffix(".onnx.data").read_bytes()
    with pytest.raises(ExportError, match="--keep auto is not possible for int8"):
        attempt(bert, tmp_path / "bert", precision="int8", quantization=options)


def test_export_keep_auto_of_packed_encoder_names_tensors(bert: Path, tmp_path: Path) -> None:
    """The measured graph packs query, key and value; the quantized one does not."""
    result = attempt(bert, tmp_path / "out", precision="int4", quantization=QuantizationOptions(keep=("auto",)))
    chosen = json.loads((result.output / "export.json").read_text())["quantization"]["eight_bits"]
    weights = json.loads((result.output / "weights-map.json").read_text())["weights"]
    packed = [w for w in weights if w.get("quantized", {}).get("part") == "packed"]
    method = {w["made_of"][0]["tensor"]: w["quantized"]["method"] for w in packed}
    products = {t: m for t, m in method.items() if "embeddings" not in t}
    assert {t for t, m in products.items() if m == "int8"} == set(chosen) < products.keys()
    assert chosen
