"""Models whose embeddings dominate: their tables are quantized, and a tied head reads the same tensor."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from lora_export.choices import Precision
from lora_export.contracts import ExportOptions, ExportResult, QuantizationOptions
from lora_export.onnx_export import export
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.progress import Silent
from lora_export.runtime import open_session
from lora_export.validation.graphs import weights as graph_weights
from tests.daily import daily
from tests.onnx_export.conftest import save_tokenizer
from tests.onnx_export.test_agreement import IDS, through_cache

Models = Callable[[str], Path]
ROWS, WIDTH, HEADS = 3000, 112, 7  # of the embeddings; rows are no whole number of blocks
CASES: list[tuple[str, Precision, tuple[str, ...], float]] = [
    ("llama", "int8", (), 1.4),
    ("llama", "int4", (), 0.9),
    ("llama", "int8", ("/model/embed_tokens/*",), 5.4),
    ("llama", "fp16", (), 2.05),
    ("untied", "int4", (), 1.1),
    ("gpt2", "int8", (), 1.4),
    ("gpt2", "nf4", (), 1.4),
    ("gpt2", "int4", (), 0.9),
    ("bert", "int4", (), 1.4),
    ("bert", "int8", (), 1.4),
    ("bert", "nf4", (), 1.4),
]
DAILY = [CASES[0], CASES[1], CASES[8]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(4)
            _model(name).save_pretrained(folder)
            save_tokenizer(folder)
        return made[name]

    return get


def _model(name: str) -> Any:
    t = transformers
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text = {"vocab_size": ROWS, "hidden_size": WIDTH, "num_hidden_layers": 1, "initializer_range": 0.3}
    if name == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=HEADS, n_positions=64, **ids)
        )
    text |= {"num_attention_heads": HEADS, "intermediate_size": 96, "max_position_embeddings": 64}
    if name == "bert":
        return t.BertModel(t.BertConfig(**text), add_pooling_layer=False)
    tied = name == "llama"
    return t.LlamaForCausalLM(t.LlamaConfig(**text, num_key_value_heads=HEADS, tie_word_embeddings=tied, **ids))


def _with_numbers_of(made: ExportResult, model: Path, auto: Any, untied: bool) -> Any:
    """The model in PyTorch, with every number that the graph holds, as the independent reader sees it. untied: of
    a tied embedding, it holds quantized numbers for the head alone."""
    with safe_open(model / "model.safetensors", framework="np") as tensors:
        shapes = {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    held = auto.from_pretrained(model, dtype=torch.float32).eval()
    if untied:
        held.lm_head.weight = torch.nn.Parameter(held.lm_head.weight.detach().clone())
    state = held.state_dict()
    for piece in graph_weights.read([made.model], shapes):
        name = next(n for n in state if n.removeprefix("transformer.") == piece.tensor.removeprefix("transformer."))
        if untied and "embed" in name and piece.quantized:
            name = "lm_head.weight"
        rows = state[name][piece.start : piece.stop]
        assert torch.isfinite(piece.values).all()
        rows.copy_(piece.values.reshape(rows.shape))
    return held


@pytest.mark.parametrize(("name", "precision", "keep", "most"), daily(CASES, DAILY))
def test_quantized_embeddings_are_small_and_right(
    models: Models, tmp_path: Path, name: str, precision: Precision, keep: tuple[str, ...], most: float
) -> None:
    """most: bytes of data for a parameter. Beside PyTorch with the graph's own numbers, read independently."""
    quantized = precision in ("int4", "int8")
    how = QuantizationOptions(accuracy_level=1 if quantized else None, keep=keep)
    made = export(
        models(name), tmp_path / "onnx", ExportOptions(precision, "cpu", quantization=how), progress=Silent()
    )
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    held = _with_numbers_of(made, models(name), auto, untied=bool(keep))
    parameters = sum(p.numel() for p in held.parameters())
    data = sum(size for file, size in made.files.items() if "data" in file)
    assert data <= most * parameters
    lookups = Counter(node.op_type for node in load_graph(made.model).graph.node)
    assert (lookups["GatherBlockQuantized"] > 0) == (precision != "fp16" and not keep)
    exact = auto.from_pretrained(models(name), dtype=torch.float32).eval()
    with torch.no_grad():
        want, unquantized = (m(torch.tensor(IDS))[0].numpy() for m in (held, exact))
    got = _last_hidden(made.model) if name == "bert" else through_cache(made.model)
    tolerance = 0.01 if precision == "fp16" else 2e-5
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    assert precision == "fp16" or np.abs(got - unquantized).max() > 1e-3 * np.abs(unquantized).max()


def _last_hidden(model: Path) -> np.ndarray[Any, Any]:
    session = open_session(model, "cpu")
    known = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
    return np.asarray(session.run(None, {i.name: known[i.name] for i in session.get_inputs()})[0])
