"""A base's measurement is another adapter's only where ONNX Runtime makes the base's graph of its files."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_export.contracts import BenchmarkResult, ExportResult
from lora_export.workflows.shared_base import SharedBase, measured_before
from tests.onnx_export.test_identity import stored

MEASURED = BenchmarkResult("cpu", True, (), None, True, "equivalent_by_structure", 1.0)


@pytest.mark.parametrize(
    ("changed", "known"), [({"large": 7.0}, True), ({"codes": 4}, True), ({"times": 3}, False)]
)
def test_measured_before_holds_for_equal_files_of_one_graph_only(
    tmp_path: Path, changed: dict[str, float], known: bool
) -> None:
    base, merged = (
        ExportResult(model.parent, "genai", "fp32", 9, 1.0, {})
        for model in (stored(tmp_path / "base"), stored(tmp_path / "merged", **changed))
    )
    shared = SharedBase(base, None, tmp_path, MEASURED, "measured with another")
    found = measured_before(shared, merged)
    assert (found is not None) is known
    if found is not None:
        assert found.verdict == "equivalent_by_structure" and "measured with another" in found.notes[-1]
    assert measured_before(replace(shared, measured=None), merged) is None
    assert measured_before(replace(shared, measured=replace(MEASURED, verdict="slower")), merged) is None
