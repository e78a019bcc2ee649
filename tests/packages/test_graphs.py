"""Graphs under other names, in chunks, and with their steps joined, compute what they did."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.errors import ExportError
from lora_export.onnx_export import check_model, export
from lora_export.packages import graphs
from lora_export.packages.targets import hub_graphs
from lora_export.progress import Silent
from tests.daily import later
from tests.onnx_export.architectures import DYNAMO, GENAI, Architecture, save
from tests.packages.conftest import save_decoder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    root = tmp_path_factory.mktemp("llama")
    return export(save_decoder(root / "model"), root / "onnx", ExportOptions("fp32", "cpu"), progress=Silent())


def session(path: Path) -> Any:
    check_model(path)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    opened = session(path)
    names = [o.name for o in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {i.name: feeds[i.name] for i in opened.get_inputs()}), strict=True))


def feeds_of(path: Path) -> dict[str, Any]:
    """A prompt of five tokens, and an empty cache."""
    found: dict[str, Any] = {}
    for given in session(path).get_inputs():
        if given.name.startswith("past"):
            found[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
        else:
            found[given.name] = np.array([[5, 6, 7, 8, 9]] if given.name == "input_ids" else [[1] * 5])
    return found


@pytest.mark.parametrize("largest", [graphs.LARGEST_CHUNK, 60_000, 40_000])
def test_data_files_are_split_into_chunks(largest: int, llama: ExportResult, tmp_path: Path) -> None:
    """Data files of at most so many bytes, which the graph names, and which hold nothing twice."""
    found = hub_graphs.lay(llama, tmp_path, "_q4", largest)
    count = found["model_q4.onnx"]
    names = ["model_q4.onnx_data", *(f"model_q4.onnx_data_{i}" for i in range(1, count))]
    assert {p.name for p in tmp_path.iterdir()} == {"model_q4.onnx", *names}
    sizes = [(tmp_path / n).stat().st_size for n in names]
    assert max(sizes) <= largest and (count > 1) == (largest < graphs.LARGEST_CHUNK)
    ranges = {graphs.range_of(t) for _, t in graphs.external(ir.load(tmp_path / "model_q4.onnx"))}
    assert all(offset % graphs.ALIGNMENT == 0 for _, offset, _ in ranges)
    assert sum(r[2] for r in ranges) <= sum(sizes) < sum(r[2] for r in ranges) + graphs.ALIGNMENT * len(ranges)
    feeds = feeds_of(llama.model)
    np.testing.assert_array_equal(
        run(tmp_path / "model_q4.onnx", feeds)["logits"], run(llama.model, feeds)["logits"]
    )


def test_chunk_tensor_larger_than_file_is_refused(llama: ExportResult, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="files of 100"):
        hub_graphs.lay(llama, tmp_path, largest=100)


# --- two steps in one --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    return made(tmp_path_factory.mktemp("bart"), DYNAMO["BartForConditionalGeneration"])


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    return made(tmp_path_factory.mktemp("whisper"), GENAI["WhisperForConditionalGeneration"])


def made(root: Path, architecture: Architecture) -> tuple[Path, ExportResult]:
    folder = save(architecture, root / "model")
    return folder, export(folder, root / "onnx", ExportOptions("fp32", "cpu"), progress=Silent())


TOKENS = (17, 33, 8, 41, 60)  # what the decoder is made to say, whatever it would


@pytest.mark.parametrize("placeholder", [0, 1], ids=["transformers.js", "optimum"])
@pytest.mark.parametrize("name", [later("bart"), "whisper"])
def test_joined_decoder_equals_both_steps(
    name: str, placeholder: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Logits of the two graphs, token by token with a cache, against those of the whole model.

    placeholder: positions of the cache that is handed over before there is one.
    """
    folder, source = request.getfixturevalue(name)
    found = hub_graphs.lay(source, tmp_path)
    assert found == {"encoder_model.onnx": 1, "decoder_model_merged.onnx": 1}
    encoder, decoder = session(tmp_path / "encoder_model.onnx"), session(tmp_path / "decoder_model_merged.onnx")
    model = transformers.AutoModel.from_pretrained(folder)
    model = getattr(transformers, model.config.architectures[0]).from_pretrained(folder).eval()
    if name == "bart":
        ids = np.array([[5, 9, 7, 30, 12, 8]])
        inputs = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 1, 1, 0]])}
        fixed = {"encoder_attention_mask": inputs["attention_mask"]}
    else:
        inputs = {"input_features": np.random.default_rng(0).normal(size=(1, 80, 3000)).astype(np.float32)}
        fixed = {}
    states = encoder.run(["last_hidden_state"], inputs)[0]
    cache = {
        i.name: np.ones((1, i.shape[1], placeholder, i.shape[3]), np.float32)
        for i in decoder.get_inputs() if i.name.startswith("past")
    }  # fmt: skip
    layers = len(cache) // 4
    assert list(cache) == [
        f"past_key_values.{i}.{of}.{what}"
        for i in range(layers) for of in ("decoder", "encoder") for what in ("key", "value")
    ]  # fmt: skip
    names = [o.name for o in decoder.get_outputs()]
    fed = [model.config.decoder_start_token_id, *TOKENS]
    with torch.no_grad():
        given = {k: torch.from_numpy(v) for k, v in inputs.items()}
        wanted = model(**given, decoder_input_ids=torch.tensor([fed])).logits[0].numpy()
    for i, token in enumerate(fed):
        feeds = {"input_ids": np.array([[token]]), "encoder_hidden_states": states, **fixed, **cache}
        feeds["use_cache_branch"] = np.array([i > 0])
        out = dict(zip(names, decoder.run(names, feeds), strict=True))
        worst = np.abs(out["logits"][0, -1] - wanted[i]).max() / np.abs(wanted).max()
        assert worst < 1e-4, (i, worst)
        cache = {n.replace("present", "past_key_values"): v for n, v in out.items() if n != "logits"}
        assert cache["past_key_values.0.decoder.key"].shape[2] == i + 1


def test_joined_decoder_holds_weights_once(bart: tuple[Path, ExportResult], tmp_path: Path) -> None:
    _, source = bart
    hub_graphs.lay(source, tmp_path)
    size = (tmp_path / "decoder_model_merged.onnx_data").stat().st_size
    assert size < 1.1 * (source.output / "decoder_model.onnx_data").stat().st_size


def test_joined_decoder_of_different_weights_is_refused(bart: tuple[Path, ExportResult], tmp_path: Path) -> None:
    import shutil

    from lora_export.packages.two_steps import joined

    _, source = bart
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        shutil.copy(source.output / name, tmp_path / name)
    model = onnx.load(tmp_path / "decoder_model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = "4096"
    (tmp_path / "decoder_model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="different weights of one name"):
        joined(tmp_path / "decoder_model.onnx", tmp_path / "decoder_with_past_model.onnx")
