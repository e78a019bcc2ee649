"""weights-map.json: written and read back; whatever else a file of that name can hold is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_export import files
from lora_export.errors import ExportError, InputError
from lora_export.onnx_export import tensor_hashes, weights_map
from lora_export.onnx_export.weights_map import (
    ALIGNMENT,
    ITEM_SIZE,
    LARGE,
    PAGE,
    Piece,
    Quantization,
    Recipe,
    Weight,
    WeightsMap,
    placed,
)

HOW = Quantization("int4", "packed", 32, False, "k_quant")
WEIGHTS = placed(
    [
        Weight("embed", "model.onnx.data", "float16", (10, 6), Recipe((Piece("e.weight", 0, 10),))),
        Weight("qkv", "model.onnx.data", "float32", (6, 9), Recipe((Piece("q", 0, 4), Piece("k", 1, 6)), True)),
        Weight("norm", "model.onnx.data", "bfloat16", (6,), Recipe((Piece("n.weight", 0, 6),), plus=1.0)),
        Weight("up_Q4", "other_data", "uint8", (9, 2, 16), Recipe((Piece("up", 0, 9),), True, quantized=HOW)),
        Weight("cache", "other_data", "float32", (300,), Recipe(computed_from=("e.weight", "rotary"))),
    ]
)
FOUND = WeightsMap(WEIGHTS, {"e.weight": "aa", "q": "bb", "rotary": "cc"})
Document = dict[str, Any]


def save(folder: Path, document: Document) -> Path:
    """A map that nobody has changed since it was written, whatever it says."""
    files.write_sealed(folder / weights_map.NAME, document)
    return folder


@pytest.fixture
def document(tmp_path: Path) -> Document:
    weights_map.write(tmp_path, FOUND)
    return files.read_sealed(tmp_path / weights_map.NAME)


def test_round_trip(tmp_path: Path) -> None:
    weights_map.write(tmp_path, FOUND)
    assert weights_map.read(tmp_path) == FOUND
    assert tensor_hashes(tmp_path) == FOUND.hashes
    assert FOUND.tensors == {"e.weight", "q", "k", "n.weight", "up"}
    assert FOUND.sizes == {"model.onnx.data": 512 + 6 * 2, "other_data": 512 + 1200}


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
pieces = st.builds(
    lambda name, start, height: Piece(name, start, start + height), names, st.integers(0, 99), st.integers(0, 99)
)
quantizations = st.builds(
    Quantization,
    st.sampled_from(["int4", "int8", "nf4", "fp4"]),
    st.sampled_from(["packed", "scales", "zero_points"]),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.booleans(),
    st.sampled_from(["default", "rtn", "k_quant"]),
)
recipes = st.builds(
    Recipe,
    st.lists(pieces, min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none() | quantizations,
    st.lists(names, max_size=3).map(tuple),
) | st.builds(Recipe, computed_from=st.lists(names, max_size=3).map(tuple))
weights = st.builds(
    Weight,
    names,
    st.sampled_from(["model.onnx.data", "decoder_model.onnx_data", "ü data"]),
    st.sampled_from(list(ITEM_SIZE)),
    st.lists(st.integers(0, 2**11), max_size=3).map(tuple),
    recipes,
)
maps = st.builds(
    lambda found, hashes: WeightsMap(placed(found), hashes),
    st.lists(weights, max_size=6, unique_by=lambda w: (w.file, w.name)),
    st.dictionaries(names, names, max_size=4),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=maps)
def test_any_map_comes_back(found: WeightsMap, tmp_path: Path) -> None:
    weights_map.write(tmp_path, found)
    read = weights_map.read(tmp_path)
    assert read == found
    ends: dict[str, int] = {}
    for weight in read.weights:  # one behind the other, where they can be mapped
        assert weight.offset % (PAGE if weight.nbytes >= LARGE else ALIGNMENT) == 0
        assert 0 <= weight.offset - ends.get(weight.file, 0) < PAGE
        ends[weight.file] = weight.offset + weight.nbytes
    assert read.sizes == ends


# --- what is no map ----------------------------------------------------------------------------------------


def _first(**changes: Any) -> Callable[[Document], None]:
    return lambda document: document["weights"][0].update(changes)


def _quantized(**changes: Any) -> Callable[[Document], None]:
    return lambda document: document["weights"][3]["quantized"].update(changes)


def _piece(**changes: Any) -> Callable[[Document], None]:
    return lambda document: document["weights"][0]["made_of"][0].update(changes)


def _without(*path: Any) -> Callable[[Document], None]:
    def remove(document: Document) -> None:
        holder: Any = document
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]

    return remove


def _again(document: Document) -> None:
    document["weights"].append(document["weights"][0] | {"offset": 4096})


# What is done to the document → what the refusal says, and of which weight or tensor.
NAMED: list[tuple[Callable[[Document], None], str, str]] = [
    (_first(file="../secret"), "a data file called '../secret'", "embed"),
    (_first(file="/etc/passwd"), "a data file called '/etc/passwd'", "embed"),
    (_first(file="sub/model.onnx.data"), "a data file called", "embed"),
    (_first(file="a\\b"), "a data file called", "embed"),
    (_first(file="C:model.onnx.data"), "a data file called", "embed"),
    (_first(file=".."), "a data file called", "embed"),
    (_first(file=""), "a data file called", "embed"),
    (_first(dtype="float8"), "the type 'float8'", "embed"),
    (_first(offset=-1), "a negative size or offset", "embed"),
    (_first(shape=[-10, -6]), "a negative size or offset", "embed"),
    (_first(offset=2**63 - 100), "bytes beyond any file", "embed"),
    (_first(shape=[2**40, 2**40]), "bytes beyond any file", "embed"),
    (_first(offset=256), "are given twice", "qkv"),
    (_first(shape=[20, 7]), "are given twice", "qkv"),
    (_again, "the weight twice", "embed"),
    (_first(made_of=[], plus=1.0), "a way to turn, shift or quantize", "embed"),
    (_first(made_of=[], transposed=True), "a way to turn, shift or quantize", "embed"),
    (_piece(rows=[0]), "the rows [0]", "e.weight"),
    (_piece(rows=[0, 3, 10]), "the rows [0, 3, 10]", "e.weight"),
    (_piece(rows=[5, 4]), "the rows [5, 4]", "e.weight"),
    (_piece(rows=[-1, 4]), "the rows [-1, 4]", "e.weight"),
    (_quantized(method="int5"), "the method 'int5'", "up_Q4"),
    (_quantized(part="bias"), "the part 'bias'", "up_Q4"),
    (_quantized(block_size=0), "blocks of 0", "up_Q4"),
    (_quantized(block_size=-32), "blocks of -32", "up_Q4"),
    (_quantized(block_size=2**40), "blocks of 1099511627776", "up_Q4"),
    (_quantized(algorithm="gptq"), "the algorithm 'gptq'", "up_Q4"),
]


def _ids(cases: list[tuple[Any, ...]]) -> list[str]:
    return [f"{i}-{case[1][:30]}" for i, case in enumerate(cases)]


@pytest.mark.parametrize(("change", "found", "tensor"), NAMED, ids=_ids(NAMED))
def test_what_cannot_be_is_refused(
    tmp_path: Path, document: Document, change: Callable[[Document], None], found: str, tensor: str
) -> None:
    change(document)
    with pytest.raises(ExportError) as refused:
        weights_map.read(save(tmp_path, document))
    assert found in refused.value.found
    assert refused.value.where == str(tmp_path / weights_map.NAME)
    assert refused.value.tensor == tensor
    assert refused.value.expected and refused.value.next_step


# What is done to the document → the place that the refusal names.
DAMAGED: list[tuple[Callable[[Document], None], str]] = [
    (_without("schema_version"), "schema_version is missing"),
    (_without("hashes"), "hashes is missing"),
    (_without("weights"), "weights is missing"),
    (lambda document: document.update(schema_version=2), "schema_version 2"),
    (lambda document: document.update(schema_version=True), "schema_version is bool"),
    (lambda document: document.update(schema_version="1"), "schema_version is str"),
    (lambda document: document.update(hashes=["aa"]), "hashes is list"),
    (lambda document: document["hashes"].update(q=None), "hashes.q is NoneType"),
    (lambda document: document.update(weights={}), "weights is dict"),
    (lambda document: document.update(extra=1), "the unknown field 'extra'"),
    (lambda document: document["weights"].append(None), "weights[5] is NoneType"),
    *((_without("weights", 1, key), f"weights[1].{key} is missing")
      for key in ("name", "file", "dtype", "shape", "offset", "made_of")),
    (_first(name=7), "weights[0].name is int"),
    (_first(file=None), "weights[0].file is NoneType"),
    (_first(dtype=["float32"]), "weights[0].dtype is list"),
    (_first(shape=60), "weights[0].shape is int"),
    (_first(shape=[10, 6.0]), "weights[0].shape[1] is float"),
    (_first(shape=[True, 6]), "weights[0].shape[0] is bool"),
    (_first(offset="0"), "weights[0].offset is str"),
    (_first(offset=2**63), "weights[0].offset is too large"),
    (_first(offset=float("nan")), "weights[0].offset is nan"),
    (_first(made_of=None), "weights[0].made_of is NoneType"),
    (_first(made_of=["e.weight"]), "weights[0].made_of[0] is str"),
    (_first(transposed="no"), "weights[0].transposed is str"),
    (_first(transposed=1), "weights[0].transposed is int"),
    (_first(plus="1"), "weights[0].plus is str"),
    (_first(plus=float("nan")), "weights[0].plus is nan"),
    (_first(plus=float("inf")), "weights[0].plus is inf"),
    (_first(plus=None), "weights[0].plus is NoneType"),
    (_first(computed_from="e.weight"), "weights[0].computed_from is str"),
    (_first(computed_from=[0]), "weights[0].computed_from[0] is int"),
    (_first(quantized="int4"), "weights[0].quantized is str"),
    (_first(minus=1.0), "the unknown field 'minus'"),
    (_without("weights", 0, "made_of", 0, "tensor"), "weights[0].made_of[0].tensor is missing"),
    (_piece(tensor=None), "weights[0].made_of[0].tensor is NoneType"),
    (_piece(rows="all"), "weights[0].made_of[0].rows is str"),
    (_piece(rows=[0.0, 10.0]), "weights[0].made_of[0].rows[0] is float"),
    (_piece(columns=[0, 1]), "the unknown field 'columns'"),
    *((_without("weights", 3, "quantized", key), f"weights[3].quantized.{key} is missing")
      for key in ("method", "part", "block_size", "symmetric", "algorithm")),
    (_quantized(method=4), "weights[3].quantized.method is int"),
    (_quantized(symmetric="yes"), "weights[3].quantized.symmetric is str"),
    (_quantized(block_size=32.0), "weights[3].quantized.block_size is float"),
    (_quantized(group=1), "the unknown field 'group'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "place"), DAMAGED, ids=_ids([(None, place) for _, place in DAMAGED]))
def test_what_is_of_another_kind_is_refused(
    tmp_path: Path, document: Document, change: Callable[[Document], None], place: str
) -> None:
    change(document)
    with pytest.raises((ExportError, InputError)) as refused:
        weights_map.read(save(tmp_path, document))
    assert place in refused.value.found
    assert refused.value.where == str(tmp_path / weights_map.NAME)
    assert refused.value.expected


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"null", b"{", b"7", b'{"weights": []}', b"[" * 100_000]
)
def test_what_is_no_document_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / weights_map.NAME).write_bytes(content)
    with pytest.raises(InputError) as refused:
        weights_map.read(tmp_path)
    assert refused.value.where == str(tmp_path / weights_map.NAME)


def test_a_map_that_was_edited_is_refused(tmp_path: Path, document: Document) -> None:
    """One hash made to fit, and the next adapter would get another's weights."""
    document["hashes"]["q"] = "dd"
    original = json.loads((tmp_path / weights_map.NAME).read_text())
    (tmp_path / weights_map.NAME).write_text(files.json_text(original | document))
    with pytest.raises(InputError, match="changed after it was written") as refused:
        weights_map.read(tmp_path)
    assert refused.value.where == str(tmp_path / weights_map.NAME)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    """JSON leaves open which of the two counts."""
    weights_map.write(tmp_path, FOUND)
    path = tmp_path / weights_map.NAME
    path.write_text(path.read_text().replace('"offset": 0,', '"offset": 0, "offset": 0,', 1))
    with pytest.raises(InputError, match="changed after it was written"):
        weights_map.read(tmp_path)


def test_empty_weights_overlap_nothing(tmp_path: Path) -> None:
    both = (Weight("a", "d", "int8", (0, 4)), Weight("b", "d", "int8", (4,)), Weight("c", "e", "int8", (4,)))
    weights_map.write(tmp_path, WeightsMap(both))
    assert weights_map.read(tmp_path).weights == both
