"""safetensors headers and indexes that must be refused: golden bytes, and random damage."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lora_export.checkpoint import TensorFiles, open_adapter_files, open_checkpoint
from lora_export.checkpoint.header import MAX_HEADER, read_header
from lora_export.errors import CheckpointError, InputError, LoraExportError

F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> str:
    return json.dumps({"w": F32_2 | changes})


def two(first: list[int], second: list[int]) -> str:
    return json.dumps(
        {
            "a": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
            "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
        }
    )


DATA = bytes(8)
# name → (bytes, what the message says, the tensor that it names or None)
REFUSED: dict[str, tuple[bytes, str, str | None]] = {
    "empty file": (b"", "0 bytes", None),
    "seven bytes": (bytes(7), "7 bytes", None),
    "header longer than the file": (raw(entry(), DATA, 10_000), "claims 10000 bytes", None),
    "header cut off": (raw(entry())[:-5], "claims", None),
    "giant header length": (raw(entry(), DATA, 2**63), f"claims {2**63} bytes", None),
    "largest header length": (raw(entry(), DATA, 2**64 - 1), "claims", None),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON", None),
    "not JSON": (raw("{nope}"), "not valid JSON", None),
    "deeply nested": (raw('{"a":' + "[" * 100_000), "not valid JSON", None),
    "a list": (raw("[]"), "not a JSON object", None),
    "a duplicate key": (raw(f'{{"w": {json.dumps(F32_2)}, "w": {json.dumps(F32_2)}}}', DATA), "twice", "w"),
    "a duplicate field": (
        raw('{"w": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', DATA),
        "twice",
        "dtype",
    ),
    "entry is a number": (raw('{"w": 3}'), "malformed", "w"),
    "entry lacks a field": (raw('{"w": {"dtype": "F32", "shape": [2]}}', DATA), "malformed", "w"),
    "entry has another field": (raw(entry(more=1), DATA), "malformed", "w"),
    "unknown dtype": (raw(entry(dtype="F12"), DATA), "unknown dtype 'F12'", "w"),
    "dtype in lower case": (raw(entry(dtype="f32"), DATA), "unknown dtype", "w"),
    "dtype is a list": (raw(entry(dtype=["F32"]), DATA), "unknown dtype", "w"),
    "dtype is null": (raw(entry(dtype=None), DATA), "unknown dtype", "w"),
    "shape is a number": (raw(entry(shape=2), DATA), "not a list of sizes", "w"),
    "negative size": (raw(entry(shape=[-2]), DATA), "not a list of sizes", "w"),
    "two negative sizes": (raw(entry(shape=[-2, -1]), DATA), "not a list of sizes", "w"),
    "boolean size": (raw(entry(shape=[True, 2]), DATA), "not a list of sizes", "w"),
    "fractional size": (raw(entry(shape=[2.0]), DATA), "not a list of sizes", "w"),
    "huge size": (raw(entry(shape=[2**63]), DATA), "not a list of sizes", "w"),
    "sizes that wrap around": (raw(entry(shape=[2**62, 4]), DATA), "no tensor has the shape", "w"),
    "product is another": (
        raw(entry(shape=[3]), DATA),
        "8 bytes for a F32 tensor of shape [3], which needs 12",
        "w",
    ),
    "negative offset": (raw(entry(data_offsets=[-8, 0]), DATA), "not two positions", "w"),
    "boolean offset": (raw(entry(data_offsets=[False, 8]), DATA), "not two positions", "w"),
    "huge offset": (raw(entry(data_offsets=[2**63, 2**63 + 8]), DATA), "not two positions", "w"),
    "three offsets": (raw(entry(data_offsets=[0, 4, 8]), DATA), "not two positions", "w"),
    "offsets in reverse": (raw(entry(data_offsets=[8, 0]), DATA), "-8 bytes", "w"),
    "overlap": (raw(two([0, 6], [4, 8]), DATA), "overlaps", "b"),
    "hole": (raw(two([0, 3], [4, 8]), DATA), "hole", "b"),
    "hole at the start": (raw(two([1, 4], [4, 8]), DATA), "hole", "a"),
    "data cut off": (raw(entry(), DATA[:5]), "cut off", "w"),
    "trailing bytes": (raw(entry(), DATA + b"x"), "no tensor claims", "w"),
    "bytes without a tensor": (raw("{}", b"x"), "no tensor claims", None),
    "metadata is a list": (raw(json.dumps({"__metadata__": [], "w": F32_2}), DATA), "__metadata__", None),
    "metadata holds a number": (
        raw(json.dumps({"__metadata__": {"a": 1}, "w": F32_2}), DATA),
        "map of strings",
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_header_damage_names_file_and_tensor(name: str, tmp_path: Path) -> None:
    content, said, tensor = REFUSED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert said in caught.value.found
    assert caught.value.where == str(path)
    assert caught.value.tensor == tensor
    assert str(path) in caught.value.message()


def test_header_over_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as f:
        f.write((MAX_HEADER + 1).to_bytes(8, "little"))
        f.truncate(MAX_HEADER + 100)  # sparse
    with pytest.raises(CheckpointError, match="claims"):
        read_header(path)


def test_header_sound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(json.dumps({
        "__metadata__": {"format": "pt"},
        "later": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
    }), bytes(16)))  # fmt: skip
    header = read_header(path)
    assert list(header.tensors) == ["scalar", "empty", "later"]
    source = TensorFiles(header.tensors)
    assert source.read("scalar").shape == ()
    assert source.read("empty").shape == (0, 7)
    assert source.read("later").dtype == torch.bfloat16


VALID = save(
    {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0, 4)},
    {"format": "pt"},
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_header_random_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever is read after damage is what the safetensors library reads from the same bytes."""
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "delete", "digit"])):
            case "flip" if content:
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "digit" if content:
                content[at] = data.draw(st.sampled_from(list(b'0123456789-[]{}",:e.')))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        try:
            header = read_header(path)
            found = {name: TensorFiles(header.tensors).read(name) for name in header.tensors}
        except CheckpointError:
            return
        theirs = load(bytes(content))
    assert set(found) == set(theirs)
    for name, value in theirs.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert (
            found[name].contiguous().reshape(-1).view(torch.uint8).tolist()
            == value.reshape(-1).view(torch.uint8).tolist()
        )


# --- folders -----------------------------------------------------------------------------------------------


def shard(folder: Path, name: str, *tensors: str) -> None:
    (folder / name).write_bytes(save({t: torch.ones(2) for t in tensors}))


def sharded(folder: Path, weight_map: object, config: object = None) -> Path:
    """config.json, shards one.safetensors (a, b) and two.safetensors (c), and the index given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    shard(folder, "one.safetensors", "a", "b")
    shard(folder, "two.safetensors", "c")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


GOOD = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
BAD_INDEX: dict[str, tuple[object, str, str | None]] = {
    "above the folder": (GOOD | {"c": "../two.safetensors"}, "points to '../two.safetensors'", "c"),
    "below the folder": (GOOD | {"c": "x/two.safetensors"}, "points to", "c"),
    "backslash": (GOOD | {"c": "..\\two.safetensors"}, "points to", "c"),
    "absolute": (GOOD | {"c": "/etc/two.safetensors"}, "points to", "c"),
    "empty name": (GOOD | {"c": ""}, "points to ''", "c"),
    "dots": (GOOD | {"c": ".."}, "points to '..'", "c"),
    "no name": (GOOD | {"c": 3}, "points to 3", "c"),
    "a pickle": (GOOD | {"c": "two.bin"}, "points to 'two.bin'", "c"),
    "missing shard": (GOOD | {"d": "three.safetensors"}, "three.safetensors, which is not there", "d"),
    "missing key": (GOOD | {"d": "two.safetensors"}, "1 tensors missing", "d"),
    "extra key": ({"a": "one.safetensors", "c": "two.safetensors"}, "1 not in the index", "b"),
    "wrong shard": (GOOD | {"a": "two.safetensors"}, "disagree", "a"),
    "no weight_map": (None, "no weight_map", None),
    "weight_map is a list": ([1], "no weight_map", None),
    "empty weight_map": ({}, "no weight_map", None),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_index_damage_is_refused(name: str, tmp_path: Path) -> None:
    weight_map, said, tensor = BAD_INDEX[name]
    folder = sharded(tmp_path / "base", weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert said in caught.value.found
    assert caught.value.where == str(folder / "model.safetensors.index.json")
    assert caught.value.tensor == tensor


def test_index_sound_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "base", GOOD))
    assert {n: t.file.name for n, t in checkpoint.tensors.items()} == GOOD
    assert checkpoint.nbytes == 24


def test_index_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base", GOOD)
    shard(folder, "two.safetensors", "c", "a")
    with pytest.raises(CheckpointError, match="1 not in the index") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == "a"


def test_checkpoint_with_only_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.where == str(tmp_path / "pytorch_model.bin")
    assert caught.value.next_step


def test_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights here"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"a": NaN'])
def test_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "base", GOOD)
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder / "config.json")


def test_missing_config_or_folder_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base", GOOD)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_checkpoint(folder)
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")


CODE = {"AutoModel": "modeling.Evil"}


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": CODE},
        {"text_config": {"auto_map": CODE}},
        {"a": [{"b": [{"auto_map": CODE}]}]},
        {"custom_pipelines": {"x": {"impl": "evil.Pipe"}}},
        {"vision_config": {"_attn_implementation_internal": "evil/kernel"}},
    ],
)
def test_config_with_code_at_any_depth_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = sharded(tmp_path / "base", GOOD, config)
    with pytest.raises(CheckpointError, match="run code that came with the model"):
        open_checkpoint(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    shard(adapter, "adapter_model.safetensors", "x")
    with pytest.raises(CheckpointError, match="run code that came with the model"):
        open_adapter_files(adapter)


def test_config_code_keys_without_value_are_accepted(tmp_path: Path) -> None:
    open_checkpoint(sharded(tmp_path / "base", GOOD, {"auto_map": None, "auto_mapping": {"x": 1}}))


def test_shard_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    import os

    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(LoraExportError):
        open_checkpoint(tmp_path)
