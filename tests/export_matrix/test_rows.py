"""The export matrix: each row exported and compared with PyTorch at other shapes, or refused for its reason."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_export.contracts import ExportOptions
from lora_export.errors import ExportError
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.progress import Silent
from tests.daily import daily
from tests.export_matrix.refused import REFUSED
from tests.export_matrix.rows import ROWS, difference

RELATIVE = 1e-4  # of fp32 results: another order of additions
EXPORTED = [name for name in ROWS if name not in REFUSED]
# One of each way to be fed and to answer.
QUICK = {
    "BertForMultipleChoice", "LayoutLMv3ForTokenClassification", "BartForSequenceClassification",
    "SiglipModel", "ConvNextForImageClassification", "Dinov2ForImageClassification",
    "SegformerForSemanticSegmentation", "WavLMForCTC", "Wav2Vec2BertForCTC",
    "MixtralForCausalLM", "Lfm2ForCausalLM", "Qwen3ForSequenceClassification", "Gemma3TextModel",
    "FalconForCausalLM", "MoonshineForConditionalGeneration",
    "VisionEncoderDecoderModel", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
}  # fmt: skip
REWEIGHTED = ("BertForMultipleChoice", "SegformerForSemanticSegmentation", "WavLMForCTC")


@pytest.fixture(scope="module")
def process() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture(autouse=True)
def one_process(process: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """All exports here run in one worker process, which imports torch once."""
    monkeypatch.setattr("lora_export.onnx_export.Worker", lambda: contextlib.nullcontext(process))


@pytest.mark.parametrize("name", daily(EXPORTED, QUICK))
def test_export_row_agrees_with_the_model(name: str, tmp_path: Path) -> None:
    _, worst = difference(ROWS[name], tmp_path)
    assert worst <= RELATIVE


@pytest.mark.parametrize("name", daily(REFUSED, {"VitsModel"}))
def test_export_refused_row_says_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=REFUSED[name]):
        difference(ROWS[name], tmp_path)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("name", daily(REWEIGHTED, {"BertForMultipleChoice"}))
def test_reweight_row_gives_a_fresh_export_byte_for_byte(name: str, tmp_path: Path) -> None:
    row, options = ROWS[name], ExportOptions("fp32", "cpu")
    row.save(tmp_path / "first")
    row.save(tmp_path / "second", seed=8)
    earlier, fresh = (
        export(tmp_path / which, tmp_path / f"{which}-onnx", options, progress=Silent())
        for which in ("first", "second")
    )
    result = reweight(earlier.output, tmp_path / "second", tmp_path / "again", progress=Silent())
    for graph in fresh.paths:
        for file in (graph, graph.with_name(f"{graph.name}_data")):
            assert (result.output / file.name).read_bytes() == file.read_bytes()
        data = f"{graph.name}_data"
        assert (earlier.output / data).read_bytes() != (fresh.output / data).read_bytes()
