"""Where the loaded model and the files differ: fused experts, renamed tensors, replicated layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_export.adapters import AdapterFile
from lora_export.checkpoint import open_checkpoint
from lora_export.contracts import AdapterChoice, MergeOptions, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.merging.architecture.model import loaded_weights
from lora_export.merging.architecture.pieces import StoredPiece, TransposedUpdate, spread
from lora_export.merging.planning.replication import config_changes, replicated_names
from tests.builders import VOCABULARY, load, logits, lora, same_bytes, save_adapter, save_base, tensors, unmerged

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
Mixtral, Qwen = transformers.MixtralForCausalLM, transformers.Qwen2MoeForCausalLM
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> Any:
    return transformers.MixtralConfig(intermediate_size=40, num_local_experts=4, **SIZES)


def qwen() -> Any:
    return transformers.Qwen2MoeConfig(
        intermediate_size=40, moe_intermediate_size=28, shared_expert_intermediate_size=36, num_experts=5, **SIZES
    )


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("model", "config", "settings", "updated"),
    [
        (Mixtral, mixtral, {"target_parameters": EXPERTS}, 2 * (1 + 4 * 3)),
        (Mixtral, mixtral, {"target_parameters": EXPERTS[:1]}, 2 * (1 + 4 * 2)),
        (Mixtral, mixtral, {"target_parameters": ["gate.weight"]}, 2 * 2),
        (Qwen, qwen, {"target_parameters": EXPERTS, "rank_pattern": {"down_proj": 3}}, 2 * (1 + 5 * 3)),
    ],
)
def test_layout_fused_in_memory_is_split_on_disk(
    tmp_path: Path, model: type, config: Any, settings: dict[str, Any], updated: int
) -> None:
    base = save_base(tmp_path / "base", model, config())
    assert any(".experts.3." in name for name in tensors(base))
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["q_proj"], **settings), model)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert result.tensors["updated"] == updated
    assert set(tensors(tmp_path / "out")) == set(tensors(base))
    assert relative(logits(load(tmp_path / "out", model)), logits(unmerged(base, adapter, model))) < 1e-5


def test_layout_fused_weight_knows_its_parts(tmp_path: Path) -> None:
    base = open_checkpoint(save_base(tmp_path / "base", Mixtral, mixtral()))
    found = loaded_weights(base, {n: t.shape for n, t in base.tensors.items()})
    disk = "model.layers.1.block_sparse_moe.experts"
    assert found["model.layers.1.mlp.experts.down_proj"] == tuple(
        StoredPiece(f"{disk}.{e}.w2.weight", expert=e) for e in range(4)
    )
    assert set(found["model.layers.1.mlp.experts.gate_up_proj"]) == {
        StoredPiece(f"{disk}.{e}.{w}.weight", e, part) for e in range(4) for part, w in enumerate(("w1", "w3"))
    }
    assert found["model.layers.0.mlp.gate.weight"] == (StoredPiece("model.layers.0.block_sparse_moe.gate.weight"),)
    assert found["lm_head.weight"] == (StoredPiece("lm_head.weight"),)


def test_layout_update_of_wrong_size_is_refused() -> None:
    update = TargetUpdate(
        "experts.down_proj", "lora_experts", ("k",), ((4, 9, 7),), lambda shape: pytest.fail("read")
    )
    pieces = tuple(StoredPiece(f"{e}.w2", e) for e in range(4))
    with pytest.raises(AdapterError, match=r"shape \[4, 9, 7\], the loaded model has \[4, 9, 8\]"):
        spread(update, pieces, {p.name: (9, 8) for p in pieces})


def test_layout_transposed_on_disk_is_updated() -> None:
    class Scale:
        def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
            return weight * torch.arange(1.0, weight.shape[1] + 1)[None, :, None]

    weight = torch.randn(2, 3, 4)
    found = TransposedUpdate(Scale()).apply(weight, slice(0, 2))
    assert torch.equal(found, weight * torch.arange(1.0, 5))
    update = TargetUpdate("w", "x", ("k",), ((2, 4, 3),), lambda shape: Scale())
    (moved,) = spread(update, (StoredPiece("disk", transposed=True),), {"disk": (2, 3, 4)})
    assert moved.target == "disk" and moved.fits((2, 3, 4))
    assert torch.equal(moved.load((2, 3, 4)).apply(weight, slice(0, 2)), found)


def test_replicated_layers_have_own_updates(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size=60_000)
    adapter = save_adapter(tmp_path / "adapter", base, lora(layer_replication=[[0, 2], [1, 2], [0, 1]]))
    merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    for layer, source in enumerate((0, 1, 1, 0)):
        name = "self_attn.o_proj.weight"
        assert same_bytes(new[f"model.layers.{layer}.{name}"], old[f"model.layers.{source}.{name}"])
    queries = [new[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(4)]
    assert not torch.equal(queries[1], queries[2]) and not torch.equal(queries[0], queries[3])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    assert relative(logits(load(tmp_path / "out")), logits(unmerged(base, adapter))) < 1e-5


def test_replicated_layers_extend_config_lists() -> None:
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "eos_token_id": [1, 2],
        "architectures": ["X"],
    }
    assert config_changes(config, [0, 2, 2, 1]) == {"num_hidden_layers": 4, "layer_types": ["a", "c", "c", "b"]}
    names = ["transformer.h.0.x", "transformer.h.1.x", "transformer.wte.weight"]
    assert replicated_names(names, [1, 0, 1], "") == {
        "transformer.wte.weight": "transformer.wte.weight",
        "transformer.h.0.x": "transformer.h.1.x",
        "transformer.h.1.x": "transformer.h.0.x",
        "transformer.h.2.x": "transformer.h.1.x",
    }


def test_replications_that_differ_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first = save_adapter(tmp_path / "a", base, lora(layer_replication=[[0, 2], [1, 2]]))
    second = save_adapter(tmp_path / "b", base, lora())
    with pytest.raises(AdapterError, match="replicate the layers differently"):
        merge(base, [AdapterChoice(first), AdapterChoice(second)], tmp_path / "out")


def test_expert_options_reach_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[AdapterFile] = []
    from lora_export import merging as room

    def note(file: AdapterFile) -> None:
        seen.append(file)
        raise AdapterError("enough")

    monkeypatch.setattr(room, "read_adapter", note)
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    with pytest.raises(AdapterError, match="enough"):
        room.plan(base, [AdapterChoice(adapter)], MergeOptions(expert_packing="expert", expert_layout="in-out"))
    assert (seen[0].expert_packing, seen[0].expert_layout) == ("expert", "in-out")
    assert seen[0].base_model_types == {"llama"}
