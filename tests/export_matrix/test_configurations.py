"""Every configuration is exported right by the builder, and what is made wrong on purpose is seen to be wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.onnx_export import export
from lora_export.progress import Silent
from tests.daily import daily
from tests.export_matrix import configurations, wrong_graphs
from tests.export_matrix.builder import MODELS
from tests.export_matrix.configurations import CONFIGURATIONS
from tests.onnx_export import architectures

RIGHT, WRONG = 1e-4, 1e-3
ALL = {**CONFIGURATIONS, **MODELS}
QUICK = ["llama-yarn", "mistral-window", "llama-headdim", "lfm2-moe"]


@pytest.mark.parametrize("name", daily(list(ALL), QUICK))
def test_configuration_is_exported_right_by_the_builder(name: str, tmp_path: Path) -> None:
    figures = configurations.measured(ALL[name], tmp_path, "genai")
    assert figures.worst <= RIGHT, figures


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportResult]:
    """The right graph of a configuration, exported once."""
    root, done = tmp_path_factory.mktemp("right"), dict[str, ExportResult]()

    def get(name: str) -> ExportResult:
        if name not in done:
            architectures.save(ALL[name], root / name / "model")
            options = ExportOptions("fp32", "cpu", engine="genai")
            done[name] = export(root / name / "model", root / name / "onnx", options, progress=Silent())
        return done[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", wrong_graphs.WRONG)
def test_wrong_graph_differs_from_pytorch(name: str, right: Callable[[str], ExportResult]) -> None:
    wrong = wrong_graphs.WRONG[name]
    result = right(wrong.configuration)
    kept = result.model.read_bytes()
    wrong_graphs.spoil(name, result.model)
    found = configurations.differences(result, architectures.build(wrong.architecture))
    result.model.write_bytes(kept)
    assert max(found) > WRONG
