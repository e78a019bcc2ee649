"""Exported graphs compute what PyTorch computes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

from lora_export.contracts import ExportResult
from lora_export.graph_runs.runs import Decoder, GraphRun, State
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.runtime import open_session
from tests.daily import later

Exported = Callable[..., ExportResult]
IDS = np.array([[5, 6, 7, 8, 9, 40, 41], [30, 31, 11, 12, 13, 60, 61]])
PROMPT = 4


def through_cache(model: Path) -> np.ndarray[Any, Any]:
    """Logits of IDS [batch, length, vocabulary]: the prompt at once, then token by token through the cache."""
    run = GraphRun(model)
    decoder, state, logits = Decoder(run, run), State(), []
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, IDS.shape[1]))]:
        step, state = decoder.step(IDS[:, start:stop], state)
        logits.append(step)
    return np.concatenate(logits, axis=1)


def reference(
    folder: Path, adapter: Path | None = None, change: Callable[[torch.nn.Module], None] = lambda model: None
) -> np.ndarray[Any, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    change(model)
    with torch.no_grad():
        result: np.ndarray[Any, Any] = model.eval()(torch.tensor(IDS)).logits.numpy()
    return result


def operators(result: ExportResult) -> Counter[str]:
    return Counter(node.op_type for node in load_graph(result.model).graph.node)


@pytest.mark.parametrize("provider", ["cpu", later("cuda")])
def test_decoder_fp32_agrees_with_transformers(exported: Exported, llama: Path, provider: str) -> None:
    got = through_cache(exported(llama, provider=provider).model)
    assert np.abs(reference(llama)).max() > 1
    assert np.abs(got - reference(llama)).max() <= 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [later(("fp16", 0.02)), ("int8", 0.1)])
def test_decoder_other_precisions_stay_close(
    exported: Exported, llama: Path, precision: str, tolerance: float
) -> None:
    got, want = through_cache(exported(llama, precision).model), reference(llama)
    assert 0 < np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_decoder_int4_computes_with_rounded_weights(exported: Exported, llama: Path) -> None:
    """Against PyTorch with the same rounding: against the fp32 model a random one correlates by 0.85 only."""
    result = exported(llama, "int4")
    assert operators(result)["MatMulNBits"] > 0
    got, want = through_cache(result.model), reference(llama, change=round_to_int4)
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.998


def round_to_int4(model: torch.nn.Module) -> None:
    """Rounded in blocks along the input dimension with zero points, as MatMulNBits stores it: of 64 numbers, and of
    half as many in the head, which is the embedding, as its rows would have an odd number of blocks."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            size = 32 if name == "lm_head" else 64
            blocks = torch.nn.functional.pad(layer.weight.data, (0, -columns % size)).reshape(rows, -1, size)
            low, high = blocks.amin(2, keepdim=True).clamp_max(0), blocks.amax(2, keepdim=True).clamp_min(0)
            scale = torch.where(high == low, 1.0, (high - low) / 15)
            zero = (-low / scale).round()
            rounded = ((blocks / scale + zero).round().clamp(0, 15) - zero) * scale
            layer.weight.data.copy_(rounded.reshape(rows, -1)[:, :columns])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), later(("fp16", 0.05))])
def test_unmerged_graph_agrees_with_peft(
    exported: Exported, llama: Path, adapter: Path, precision: str, tolerance: float
) -> None:
    unmerged = exported(llama, precision, adapter=adapter)
    want = reference(llama, adapter)
    assert np.abs(want - reference(llama)).max() > 0.1
    assert np.abs(through_cache(unmerged.model) - want).max() <= tolerance
    assert unmerged.nodes > exported(llama, precision).nodes


def test_decoder_has_fused_attention_and_one_embedding(exported: Exported, llama: Path) -> None:
    result = exported(llama)
    assert operators(result)["GroupQueryAttention"] == 2
    parameters = (llama / "model.safetensors").stat().st_size
    rotary = 2 * 64 * 8 * 4  # cos and sin caches: positions × half the head size, fp32
    assert result.files["model.onnx.data"] < parameters + rotary + 4096


def test_decoder_signature_is_read(exported: Exported, llama: Path) -> None:
    signature = GraphRun(exported(llama, "fp16").model).signature
    assert len(signature.cache) == 4
    assert signature.cache["past_key_values.1.key"] == "present.1.key"
    assert signature.cache_shape("past_key_values.1.key", 3, 5) == (3, 2, 5, 16)
    assert signature.inputs["past_key_values.1.value"].dtype == np.float16
    assert signature.inputs["input_ids"].dtype == np.int64


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), later(("fp16", 0.05))])
def test_encoder_agrees_with_transformers(exported: Exported, bert: Path, precision: str, tolerance: float) -> None:
    from transformers import AutoModel

    result = exported(bert, precision)
    assert operators(result)["Attention"] == 2
    types = {tensor.data_type for tensor in load_graph(result.model).graph.initializer}
    assert (TensorProto.FLOAT16 in types, TensorProto.FLOAT in types) == (
        precision == "fp16",
        precision == "fp32",
    )
    session = open_session(result.model, "cpu")
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    feed = {"input_ids": IDS, "attention_mask": mask}  # all that its tokenizer makes
    assert {i.name for i in session.get_inputs()} == set(feed)
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state"]
    with torch.no_grad():
        want = AutoModel.from_pretrained(bert)(**{k: torch.tensor(v) for k, v in feed.items()})[0].numpy()
    (got,) = session.run(None, feed)
    assert np.abs(got - want)[mask.astype(bool)].max() <= tolerance
