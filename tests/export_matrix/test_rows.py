"""The export matrix: each row exported and compared with PyTorch at other shapes, or refused for its reason."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import ExportResult
from lora_export.errors import ExportError
from lora_export.onnx_export import reweight
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.progress import Silent
from tests.daily import daily
from tests.export_matrix.refused import REFUSED
from tests.export_matrix.rows import ROWS, difference, exported

RELATIVE = 1e-4  # of fp32 results: another order of additions
EXPORTED = [name for name in ROWS if name not in REFUSED]
# One of each way to be fed and to answer.
QUICK = {
    "BertForMultipleChoice", "LayoutLMv3ForTokenClassification", "BartForSequenceClassification",
    "SiglipModel", "ConvNextForImageClassification", "SegformerForSemanticSegmentation",
    "WavLMForCTC", "Wav2Vec2BertForCTC",
    "MixtralForCausalLM", "Lfm2ForCausalLM", "Qwen3ForSequenceClassification",
    "FalconForCausalLM",
    "VisionEncoderDecoderModel", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
}  # fmt: skip
Made = Callable[[str], tuple[Any, ExportResult]]
REWEIGHTED = ("BertForMultipleChoice", "SegformerForSemanticSegmentation", "WavLMForCTC")


@pytest.fixture(scope="module")
def process() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture(autouse=True)
def one_process(process: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """All exports here run in one worker process, which imports torch once."""
    monkeypatch.setattr("lora_export.onnx_export.Worker", lambda: contextlib.nullcontext(process))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A row's name → its model and its export, each made once."""
    done: dict[str, tuple[Any, ExportResult]] = {}

    def get(name: str) -> tuple[Any, ExportResult]:
        if name not in done:
            done[name] = exported(ROWS[name], tmp_path_factory.mktemp(name))
        return done[name]

    return get


@pytest.mark.parametrize("name", daily(EXPORTED, QUICK))
def test_export_row_agrees_with_the_model(name: str, made: Made) -> None:
    model, result = made(name)
    assert ROWS[name].compare(result, model) <= RELATIVE


@pytest.mark.parametrize("name", daily(REFUSED, {"VitsModel"}))
def test_export_refused_row_says_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=REFUSED[name]):
        difference(ROWS[name], tmp_path)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("name", daily(REWEIGHTED, {"BertForMultipleChoice"}))
def test_reweight_row_gives_a_fresh_export_byte_for_byte(name: str, made: Made, tmp_path: Path) -> None:
    _, earlier = made(name)
    _, fresh = exported(ROWS[name], tmp_path, seed=8)
    result = reweight(earlier.output, tmp_path / "model", tmp_path / "again", progress=Silent())
    for graph in fresh.paths:
        for file in (graph, graph.with_name(f"{graph.name}_data")):
            assert (result.output / file.name).read_bytes() == file.read_bytes()
        data = f"{graph.name}_data"
        assert (earlier.output / data).read_bytes() != (fresh.output / data).read_bytes()
