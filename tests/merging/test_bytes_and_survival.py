"""What a merge leaves alone, what survives rounding, and what --max-memory may not change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError
from lora_export.merging import CERTIFICATE, merge
from tests.builders import (
    edit_json,
    edit_tensors,
    handmade_adapter,
    handmade_base,
    llama_config,
    load,
    lora,
    save_adapter,
    save_base,
    tensors,
)

COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}\r\n',
    "tokenizer_config.json": '{ "odd"  : "spacing" }',
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id":[2 ,3]}',
    "LICENSE": "as is",
}
LEFT_OUT = {"modeling_evil.py": "import os", "pytorch_model.bin": "x", "old.index.json": "{}", ".hidden": "x"}


def zero_adapter(folder: Path, base: Path, **settings: object) -> Path:
    save_adapter(folder, base, lora(**settings))
    path = folder / "adapter_model.safetensors"
    edit_tensors(path, {n: torch.zeros_like(t) for n, t in load_file(path).items() if "lora_B" in n})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_merge_zero_adapter_changes_no_byte(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    base = save_base(tmp_path / "base", config=llama_config(tied), dtype=dtype, max_shard_size=40_000)
    for name, text in (COMPANIONS | LEFT_OUT).items():
        (base / name).write_bytes(text.encode())
    config = json.dumps(json.loads((base / "config.json").read_text()), separators=(" ,", ":  "))
    (base / "config.json").write_text(config)
    adapter = zero_adapter(tmp_path / "adapter", base)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert any("changes nothing" in text for text in result.warnings)
    assert result.delta_survival is None
    kept = {p.name for p in base.iterdir()} - set(LEFT_OUT)
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept | {CERTIFICATE}
    for name in kept:
        if name.endswith(".safetensors"):
            before, after = load_file(base / name), load_file(tmp_path / "out" / name)
            assert set(before) == set(after)
            for key, value in before.items():
                assert value.view(torch.uint8).equal(after[key].view(torch.uint8)), key
        elif not name.endswith(".index.json"):
            assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    load(tmp_path / "out")


def test_merge_prefers_tokenizer_of_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for name, text in COMPANIONS.items():
        (base / name).write_text(text)
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("theirs")
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "theirs"
    assert (tmp_path / "out" / "generation_config.json").read_text() == COMPANIONS["generation_config.json"]
    assert any("taken from the adapter" in text for text in result.warnings)


@pytest.mark.parametrize("size", [3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_survival_matches_float64(tmp_path: Path, size: float, dtype: str) -> None:
    """⟨W'−W, Δ⟩/⟨Δ, Δ⟩ in numpy's float64, with W' as it lies in the merged file."""
    torch_type = getattr(torch, dtype)
    base = handmade_base(tmp_path / "base", {"m.proj.weight": (300, 200), "m.up.weight": (90, 200)}, torch_type)
    generator = torch.Generator().manual_seed(3)
    scale = (size * 0.02 / (2.5 * 6**0.5)) ** 0.5
    matrices = {
        f"m.{name}": (
            torch.randn(6, 200, generator=generator) * scale,
            torch.randn(rows, 6, generator=generator) * scale,
        )
        for name, rows in (("proj", 300), ("up", 90))
    }
    adapter = handmade_adapter(tmp_path / "adapter", matrices)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    certificate = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    records = {r["name"]: r for r in certificate["records"]}
    before, after = tensors(base), tensors(tmp_path / "out")
    kept = total = 0.0
    for module, (a, b) in matrices.items():
        name = f"{module}.weight"
        delta = 2.5 * (b.double().numpy() @ a.double().numpy())
        moved = after[name].double().numpy() - before[name].double().numpy()
        share = np.vdot(moved, delta) / np.vdot(delta, delta)
        assert records[name]["survival"] == pytest.approx(share, rel=2e-3)
        weight = before[name].double().numpy()
        expected = np.linalg.norm(delta) / np.linalg.norm(weight)
        assert records[name]["relative_delta"] == pytest.approx(expected, rel=2e-3)
        kept, total = kept + np.vdot(moved, delta), total + np.vdot(delta, delta)
    assert certificate["delta_survival"] == result.delta_survival == pytest.approx(kept / total, rel=2e-3)
    told = any("survives rounding" in text for text in result.warnings)
    assert told is bool(kept / total < 0.9)
    if dtype == "bfloat16" and size == 3e-4:
        assert result.delta_survival < 0.5
        fine = merge(base, [AdapterChoice(adapter)], tmp_path / "fine", MergeOptions(dtype="float32"))
        assert fine.delta_survival == pytest.approx(1)


def test_certificate_records_operations(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, lora(modules_to_save=["lm_head"]))
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    certificate = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    records = {r["name"]: r for r in certificate["records"]}
    assert set(records) == set(tensors(tmp_path / "out"))
    assert records["lm_head.weight"]["operation"] == "replaced"
    assert records["lm_head.weight"]["kinds"] == ["modules_to_save"]
    assert records["model.layers.1.mlp.down_proj.weight"]["operation"] == "updated"
    copied = records["model.norm.weight"]
    assert copied.pop("hash_in") == copied.pop("hash_out") is not None
    assert copied == {
        "name": "model.norm.weight", "operation": "copied", "dtype": "F32", "shape": [48], "kinds": [],
        "relative_delta": None, "survival": None, "max_ulps": None, "mean_ulps": None, "checked": 0, "saturated": 0,
    }  # fmt: skip
    assert certificate["tensors"] == result.tensors
    assert (
        str(tmp_path / "out") not in (tmp_path / "out" / CERTIFICATE).read_text()
    )  # the same merge, the same bytes


def test_merge_twice_gives_same_bytes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size=60_000)
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    for name in ("one", "two"):
        merge(base, [AdapterChoice(adapter)], tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("config", "flips"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, True),
        ({"model_type": "llama"}, False),
    ],
)
@pytest.mark.parametrize("flag", [False, True])
def test_merge_square_conv1d_follows_architecture(
    config: dict[str, Any], flips: bool, flag: bool, tmp_path: Path
) -> None:
    """A square weight fits both ways, and PEFT computes by the layer, whatever fan_in_fan_out says."""
    base = handmade_base(tmp_path / "base", {"m.c_proj.weight": (40, 40)}, **config)
    a, b = torch.randn(6, 40), torch.randn(40, 6)
    adapter = handmade_adapter(tmp_path / "adapter", {"m.c_proj": (a, b)}, fan_in_fan_out=flag)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    delta = 2.5 * (b @ a).double()
    expected = tensors(base)["m.c_proj.weight"].double() + (delta.T if flips else delta)
    assert float((tensors(tmp_path / "out")["m.c_proj.weight"].double() - expected).abs().max()) < 1e-4


def test_merge_two_adapters_replacing_one_tensor_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapters = [
        save_adapter(tmp_path / n, base, lora(modules_to_save=["lm_head"]), seed=i) for i, n in enumerate("AB", 3)
    ]
    with pytest.raises(AdapterError, match="two adapters replace this tensor") as caught:
        merge(base, [AdapterChoice(a) for a in adapters], tmp_path / "out")
    assert caught.value.tensor == "lm_head.weight"


def test_merge_differently_resized_embeddings_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, lora(), rows=107, save_embeddings=True)
    edit_tensors(adapter / "adapter_model.safetensors", {"base_model.model.lm_head.weight": None})
    with pytest.raises(AdapterError, match="resized to 107") as caught:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert caught.value.tensor == "lm_head.weight"


def test_merge_keeps_dtype_key_of_old_configs(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32", "name": "Ünïcode"}))
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(dtype="bfloat16"))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["torch_dtype"] == "bfloat16" and "dtype" not in found
    assert {k: v for k, v in found.items() if k != "torch_dtype"} == config | {"name": "Ünïcode"}


def test_merge_keeps_metadata_and_scalars(tmp_path: Path) -> None:
    base = handmade_base(tmp_path / "base", {"m.proj.weight": (8, 4)})
    edit_tensors(base / "model.safetensors", {"m.count": torch.tensor(7), "m.empty": torch.zeros(0, 3)})
    adapter = handmade_adapter(tmp_path / "adapter", {"m.proj": (torch.randn(2, 4), torch.randn(8, 2))})
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found["m.count"].item() == 7 and found["m.count"].shape == ()
    assert found["m.empty"].shape == (0, 3)
    edit_json(base / "config.json", x=1)
