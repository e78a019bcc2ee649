"""The JSON page names what the results really write."""

from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import (
    BenchmarkResult,
    ExportResult,
    MergeResult,
    PackageResult,
    Story,
    ValidationResult,
    Verification,
)
from lora_export.storage.documents import as_json
from tests.docs.pages import tool

MERGED = MergeResult(Path("o"), {}, {}, 0.0, 0, None, Path("c"), "dequantized", "float32")
RESULTS = [
    MERGED,
    ValidationResult(()),
    ExportResult(Path("o"), "genai", "fp32", 0, 0.0, {}),
    BenchmarkResult("cpu", True, (), None, None, "inconclusive", 0.0),
    PackageResult(Path("o"), "hf", "name", {}, (), {}, None, False, 0.0),
    Verification(()),
    Story(Path("o"), MERGED),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_json_page_has_exactly_the_fields(result: Any) -> None:
    reference = tool("reference")
    assert set(reference.fields(type(result))) == set(as_json(result))
    assert type(result) in reference.DOCUMENTS.values()
