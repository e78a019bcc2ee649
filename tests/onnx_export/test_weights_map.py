"""weights-map.json: read as it was written, and distrusted."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import ExportError
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Piece, Quantization, Recipe, Weight, WeightsMap, placed

INT4 = Quantization("int4", "packed", 32, False, "k_quant")
MAP = WeightsMap(
    placed(
        [
            Weight("plain", "a.bin", "float32", (6, 4), Recipe((Piece("w", 0, 6),))),
            Weight("turned", "a.bin", "float16", (4, 6), Recipe((Piece("w", 0, 2), Piece("v", 1, 5)), True, 1.0)),
            Weight("packed", "b.bin", "uint8", (6, 2, 16), Recipe((Piece("w", 0, 6),), True, 0.0, INT4)),
            Weight("constant", "b.bin", "int64", (3,), Recipe(computed_from=("v",))),
            Weight("large", "b.bin", "bfloat16", (1024, 1024), Recipe((Piece("w", 0, 1024),))),
        ]
    ),
    {"w": "00", "v": "11"},
)


def test_weights_map_round_trips(tmp_path: Path) -> None:
    weights_map.write(tmp_path, MAP)
    assert weights_map.read(tmp_path) == MAP
    assert MAP.tensors == {"w", "v"}


def test_weights_map_offsets_are_aligned() -> None:
    offsets = {w.name: w.offset for w in MAP.weights}
    assert offsets == {"plain": 0, "turned": 256, "packed": 0, "constant": 256, "large": 4096}
    assert MAP.sizes == {"a.bin": 256 + 4 * 6 * 2, "b.bin": 4096 + 2**21}


def spoiled(document: dict[str, Any], where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    inner: Any = document
    for step in where[:-1]:
        inner = inner[step]
    if value is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return document


W = "weights"
CASES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("schema_version",), 2, "schema_version 2"),
    (("schema_version",), None, "schema_version"),
    (("hashes",), {"w": 1}, "hashes"),
    ((W,), {}, "weights"),
    ((W, 0), [], "weights"),
    ((W, 0, "name"), 5, "name"),
    ((W, 0, "file"), "../a.bin", "plain file name"),
    ((W, 0, "file"), "sub/a.bin", "plain file name"),
    ((W, 0, "dtype"), "float8", "float8"),
    ((W, 0, "offset"), -1, "negative"),
    ((W, 0, "offset"), True, "offset"),
    ((W, 0, "shape"), [6, -4], "negative"),
    ((W, 0, "shape"), ["6"], "shape"),
    ((W, 0, "shape"), [100, 4], "given twice"),
    ((W, 1, "offset"), 8, "given twice"),
    ((W, 1, "transposed"), "yes", "transposed"),
    ((W, 1, "plus"), "1", "plus"),
    ((W, 1, "plus"), float("nan"), "holds nan"),
    ((W, 1, "made_of"), None, "made_of"),
    ((W, 1, "made_of", 0, "rows"), [2, 0], "rows"),
    ((W, 1, "made_of", 0, "rows"), [-1, 1], "rows"),
    ((W, 1, "made_of", 0, "rows"), [0], "rows"),
    ((W, 1, "made_of", 0, "tensor"), ["w"], "tensor"),
    ((W, 2, "quantized"), [], "quantized"),
    ((W, 2, "quantized", "method"), "int2", "int2"),
    ((W, 2, "quantized", "part"), "bias", "bias"),
    ((W, 2, "quantized", "block_size"), 0, "block_size"),
    ((W, 3, "computed_from"), "v", "computed_from"),
]


@pytest.mark.parametrize(("where", "value", "said"), CASES)
def test_weights_map_inconsistent_is_refused(where: tuple[Any, ...], value: Any, said: str, tmp_path: Path) -> None:
    weights_map.write(tmp_path, MAP)
    path = tmp_path / weights_map.NAME
    path.write_text(json.dumps(spoiled(json.loads(path.read_text()), where, value)))
    with pytest.raises(Exception, match=said) as raised:
        weights_map.read(tmp_path)
    assert isinstance(raised.value, ExportError) or type(raised.value).__name__ == "InputError"
    assert weights_map.NAME in str(raised.value)
