"""Raw protobuf is read in one file: everywhere else a graph is onnx_ir's."""

import ast
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lora_export
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import open_model

PACKAGE = Path(lora_export.__file__).parent
READS_PROTOBUF = {"onnx_export/graphs/checks.py"}
# onnx.defs, the registry of operators, which onnx_ir does not have.
ASKS_FOR_SCHEMAS = {"onnx_export/graphs/operator_roles.py", "allowed/graphs.py"}
ASKS_THE_CHECKER = {"packages/targets/mlflow.py"}  # as mlflow.onnx does, before it loads a graph


def imports_of_onnx(source: str) -> set[str]:
    """Modules of the package onnx that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found |= {name for name in names if name.split(".")[0] == "onnx"}
    return found


def test_raw_protobuf_is_read_in_one_file() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): modules
        for path in PACKAGE.rglob("*.py")
        if (modules := imports_of_onnx(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == READS_PROTOBUF | ASKS_FOR_SCHEMAS | ASKS_THE_CHECKER
    assert all(found[name] == {"onnx.defs"} for name in ASKS_FOR_SCHEMAS)
    assert all(found[name] == {"onnx.checker"} for name in ASKS_THE_CHECKER)


def test_imports_of_onnx_are_found_wherever_they_stand() -> None:
    source = "def f():\n    import onnx\n    from onnx.helper import make_node\n    import onnx_ir, onnxruntime"
    assert imports_of_onnx(source) == {"onnx", "onnx.helper"}


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    """onnx_ir would drop them without a word."""
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], np.ones(1, np.float32))
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [3]), [8])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:])
    graph.sparse_initializer.append(sparse)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="sparse"):
        open_model(tmp_path / "model.onnx")
