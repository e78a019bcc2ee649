"""LoRA on fused experts: packing, layout, nesting, and what cannot be told from the file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.adapters import AdapterFile, read_adapter
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError
from tests.builders import handmade_adapter

E, R, IN, OUT = 4, 3, 10, 14
UP, DOWN = "experts.base_layer", "experts"


def adapter(folder: Path, matrices: dict[str, tuple[int, int]], **settings: Any) -> tuple[list[TargetUpdate], Any]:
    """module → (in, out): an adapter of rank 3 on four experts, and its matrices."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for module, (width, height) in matrices.items():
        values[f"base_model.model.l.{module}.lora_A.weight"] = torch.randn(E * R, width, generator=generator)
        values[f"base_model.model.l.{module}.lora_B.weight"] = torch.randn(height, E * R, generator=generator)
    save_file(values, folder / "adapter_model.safetensors")
    options = {k: settings.pop(k) for k in ("expert_packing", "expert_layout", "base_model_types") if k in settings}
    config = {
        "peft_type": "LORA", "r": R, "lora_alpha": 15, "peft_version": "0.21.2",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    } | settings  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    config, tensors = open_adapter_files(folder)
    found = read_adapter(AdapterFile(tensors, config, folder / "adapter_config.json", **options))
    return list(found.updates), values


def delta(values: Any, module: str, expert_major: bool = False) -> torch.Tensor:
    """(experts, out, in) in float64, one expert at a time."""
    a = values[f"base_model.model.l.{module}.lora_A.weight"].double()
    b = values[f"base_model.model.l.{module}.lora_B.weight"].double()
    experts = []
    for e in range(E):
        columns = [e * R + r if expert_major else r * E + e for r in range(R)]
        experts.append(b[:, columns] @ a[e * R : (e + 1) * R])
    return 5.0 * torch.stack(experts)


def applied(update: TargetUpdate, shape: tuple[int, ...]) -> torch.Tensor:
    """What the update adds to a weight of zeros, asked for in blocks of experts."""
    loaded = update.load(shape)
    blocks = [loaded.apply(torch.zeros(1, *shape[1:]), slice(e, e + 1)) for e in range(shape[0])]
    return torch.cat(blocks).double()


def test_experts_inner_matrices_belong_to_first_parameter(tmp_path: Path) -> None:
    updates, values = adapter(tmp_path, {UP: (IN, OUT), DOWN: (OUT // 2, IN)})
    found = {u.target: u for u in updates}
    assert set(found) == {"l.experts.gate_up_proj", "l.experts.down_proj"}
    for name, module, shape in (("gate_up_proj", UP, (E, OUT, IN)), ("down_proj", DOWN, (E, IN, OUT // 2))):
        torch.testing.assert_close(
            applied(found[f"l.experts.{name}"], shape), delta(values, module), rtol=1e-6, atol=1e-5
        )


def test_experts_stored_in_out_get_transposed_delta(tmp_path: Path) -> None:
    updates, values = adapter(tmp_path, {DOWN: (IN, OUT)}, target_parameters=["experts.down_proj"])
    expected = delta(values, DOWN).transpose(1, 2)
    torch.testing.assert_close(applied(updates[0], (E, IN, OUT)), expected, rtol=1e-6, atol=1e-5)


def test_experts_expert_major_packing_changes_delta(tmp_path: Path) -> None:
    updates, values = adapter(
        tmp_path, {DOWN: (IN, OUT)}, target_parameters=["experts.down_proj"], expert_packing="expert"
    )
    found = applied(updates[0], (E, OUT, IN))
    torch.testing.assert_close(found, delta(values, DOWN, expert_major=True), rtol=1e-6, atol=1e-5)
    assert not torch.allclose(found, delta(values, DOWN), rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "transposed"),
    [
        ({"peft_version": "0.21.2"}, False),
        ({"peft_version": "0.19.0.dev0@UNKNOWN"}, False),
        ({"peft_version": "0.18.1"}, True),
        ({"peft_version": None}, True),
        ({"peft_version": "0.21.2", "base_model_types": frozenset({"gpt_oss"})}, True),
        ({"peft_version": "0.18.1", "expert_layout": "out-in"}, False),
        ({"peft_version": "0.21.2", "expert_layout": "in-out"}, True),
    ],
)
def test_experts_square_layout_follows_version_architecture_or_option(
    tmp_path: Path, settings: dict[str, Any], transposed: bool
) -> None:
    updates, values = adapter(tmp_path, {DOWN: (IN, IN)}, target_parameters=["experts.down_proj"], **settings)
    expected = delta(values, DOWN)
    expected = expected.transpose(1, 2) if transposed else expected
    torch.testing.assert_close(applied(updates[0], (E, IN, IN)), expected, rtol=1e-6, atol=1e-5)


def test_experts_square_with_unreadable_version_is_refused(tmp_path: Path) -> None:
    updates, _ = adapter(
        tmp_path, {DOWN: (IN, IN)}, target_parameters=["experts.down_proj"], peft_version="yesterday"
    )
    with pytest.raises(AdapterError, match="peft_version is 'yesterday'") as refusal:
        updates[0].load((E, IN, IN))
    assert "--expert-layout" in str(refusal.value)


@pytest.mark.parametrize(
    ("matrices", "settings", "told"),
    [
        ({DOWN: (IN, OUT)}, {}, "1 pairs of matrices for the parameters gate_up_proj, down_proj"),
        ({UP: (IN, OUT), DOWN: (OUT, IN)}, {"target_parameters": ["experts.x", "experts.y"]}, "order of 'x'"),
        ({UP: (IN, OUT), DOWN: (OUT, IN)}, {"r": 5}, "not of rank 5 for each expert"),
        ({UP: (IN, OUT), DOWN: (OUT, IN)}, {"init_lora_weights": "pissa"}, "pissa on fused experts"),
    ],
)
def test_experts_ambiguous_layout_is_refused(
    tmp_path: Path, matrices: dict[str, tuple[int, int]], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(AdapterError, match=told):
        adapter(tmp_path, matrices, **settings)


@pytest.mark.parametrize("weight", ["l.experts.down_proj", "l.experts.0.w2.weight", "l.moe.gate_up_proj"])
def test_experts_target_parameters_without_matrices_are_ignored(tmp_path: Path, weight: str) -> None:
    """PEFT names the experts of an architecture though this model of it is dense."""
    a, b = torch.zeros(R, IN), torch.ones(OUT, R)
    names = {"target_parameters": ["gate_up_proj", "down_proj"]}
    folder = handmade_adapter(tmp_path / "a", {"l.q_proj": (a, b)}, **names)
    config, tensors = open_adapter_files(folder)
    dense = {"l.q_proj.weight": (OUT, IN), "l.down_proj.weight": (IN, OUT)}
    file = AdapterFile(tensors, config, folder / "adapter_config.json", base_shapes=dense)
    assert [u.target for u in read_adapter(file).updates] == ["l.q_proj.weight"]
    with pytest.raises(AdapterError, match="the file holds no matrices for them"):
        read_adapter(replace(file, base_shapes=dense | {weight: (E, IN, OUT)}))
