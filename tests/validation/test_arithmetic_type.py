"""The type that a proof takes a graph to compute in."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper as h
from onnx import numpy_helper

from lora_export.validation.proof.reference import arithmetic_of


@pytest.mark.parametrize(("narrow", "expected"), [(np.float16, "float16"), (np.float32, "float32")])
def test_arithmetic_type_without_a_map_is_that_of_the_graph(narrow: type, expected: str, tmp_path: Path) -> None:
    """An unmerged export has no map. One number in fp32 beside the weights, as an epsilon, does not count."""
    weights = [numpy_helper.from_array(np.ones(4, narrow), "w"), numpy_helper.from_array(np.float32(1), "epsilon")]
    graph = h.make_graph([], "g", [], [], weights)
    onnx.save(h.make_model(graph), tmp_path / "model.onnx")
    assert arithmetic_of(tmp_path, ["model.onnx"]) == expected
