"""Layers that other libraries quantized (samples/, by tools/quantized_samples.py) are read as they read them.

Each sample holds the parts of one layer, `expected`, the weight as its library dequantizes it in fp32, and in its
metadata the config.json and the library's version.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from lora_export.checkpoint import Checkpoint, open_checkpoint
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.merging import merge
from lora_export.quantization import find_quantized
from tests.builders import VOCABULARY, edit_json, load, logits, lora, save_adapter, save_base, tensors, unmerged

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.safetensors"))
WEIGHT = "model.layers.0.mlp.down_proj.weight"


def opened(sample: Path, folder: Path) -> tuple[Checkpoint, torch.Tensor]:
    """A checkpoint of the sample's layer alone, and what its library makes of it."""
    with safe_open(sample, framework="pt") as file:
        metadata = file.metadata()
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    expected = values.pop("expected")
    (folder / "config.json").write_text(metadata.pop("config"))
    save_file(values, folder / "model.safetensors", metadata)
    return open_checkpoint(folder), expected


@pytest.mark.parametrize("sample", SAMPLES, ids=[s.stem for s in SAMPLES])
def test_sample_weight_matches_its_library(tmp_path: Path, sample: Path) -> None:
    checkpoint, expected = opened(sample, tmp_path)
    found = find_quantized(checkpoint, checkpoint.config)
    assert set(found) == {WEIGHT}
    weight = found[WEIGHT]
    assert set(weight.parts) == set(checkpoint.tensors)  # nothing is left over in a merged folder
    assert weight.shape == tuple(expected.shape)
    rows = weight.load(checkpoint)
    whole = rows.rows(0, weight.shape[0])
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, expected, rtol=2.0**-23, atol=2.0**-26 * float(expected.abs().max()))
    for start, stop in ((0, 1), (3, 10), (len(whole) - 1, len(whole))):
        assert torch.equal(rows.rows(start, stop), whole[start:stop])


def test_samples_cover_each_library() -> None:
    made_by = set()
    for sample in SAMPLES:
        with safe_open(sample, framework="pt") as file:
            made_by.add(file.metadata()["made_by"].split()[0])
            json.loads(file.metadata()["config"])
    assert made_by == {"hqq", "optimum-quanto", "torchao", "mlx", "auto-round"}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("hqq-3-axis1", True),
        ("hqq-4-axis0", False),
        ("quanto-qint4", False),
        ("torchao-int8", True),
        ("mlx-3-64", True),
        ("autoround-gptq-3", True),
    ],
)
def test_sample_base_merge_equals_unmerged(tmp_path: Path, name: str, keys: bool) -> None:
    """Beside layers that are not quantized; nothing of the codes is left. keys: whether config.json names them."""
    folder = tmp_path / "layer"
    folder.mkdir()
    layer, expected = opened(next(s for s in SAMPLES if s.stem == name), folder)
    edit_json(folder / "config.json", vocab_size=VOCABULARY)
    config = {k: v for k, v in layer.config.items() if "quantization" not in k} | {"vocab_size": VOCABULARY}
    plain = save_base(tmp_path / "plain", config=transformers.LlamaConfig(**config))
    save_file(tensors(plain) | {WEIGHT: expected}, plain / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", plain, lora(target_modules=["q_proj", "down_proj"]))
    rest = {k: v for k, v in tensors(plain).items() if k != WEIGHT}
    save_file(rest | tensors(folder), folder / "model.safetensors", dict(layer.metadata))
    for key in () if keys else ("quantization_config",):
        edit_json(folder / "config.json", **{key: None})
    (folder / "quanto_qmap.json").write_text("{}")
    out = tmp_path / "out"
    result = merge(folder, [AdapterChoice(adapter)], out, MergeOptions(dtype="float32"))
    assert result.tensors["updated"] == 4 and result.tensors["dequantized"] == 0
    assert tensors(out).keys() == tensors(plain).keys()
    assert {"quantization_config", "quantization"}.isdisjoint(json.loads((out / "config.json").read_text()))
    assert not (out / "quanto_qmap.json").exists()
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    wanted = logits(unmerged(plain, adapter))
    assert float((logits(load(out)) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
