"""A package whose weights lie in several data files, as those of a model of more than 2 GiB do."""

from pathlib import Path

import numpy as np
import pytest

from lora_export.contracts import PackageOptions
from lora_export.packages.targets import transformers_js
from lora_export.progress import Silent
from lora_export.workflows.packaging import package
from tests.consumers import environments as consumers
from tests.consumers.agreement import NEAR
from tests.consumers.models import Delivered
from tests.consumers.test_readmes import packed, program, said_by

pytestmark = pytest.mark.slow


def test_transformers_js_reads_several_data_files(
    encoder: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_js, "LARGEST_CHUNK", 50_000_000)
    options = PackageOptions(variants=("fp32",))
    made = package(encoder.root / "run", "transformers-js", tmp_path / "package", options, Silent())
    assert {n for n in made.files if "_data" in n} == {"onnx/model.onnx_data", "onnx/model.onnx_data_1"}
    whole, _ = packed(encoder, "transformers-js")
    wanted = said_by(whole, "transformers-js")
    np.testing.assert_allclose(consumers.node(program(made.output)), wanted, atol=NEAR)
