"""Adapters as their trainers write them: names, files, configurations, and what must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import LoraExportError
from lora_export.merging import merge
from tests.builders import edit_json, handmade_base, tensors

Q = "model.layers.0.self_attn.q_proj"
R, S = 3, 5.0  # rank, and scaling with alpha 15
A, B = torch.randn(R, 10), torch.randn(8, R)
EXPERTS, WIDTH, HEIGHT = 4, 6, 5  # hidden and intermediate size
GATE, DOWN = "model.layers.0.mlp.experts.{}.gate_proj.weight", "model.layers.0.mlp.experts.{}.down_proj.weight"


def save(
    folder: Path, values: dict[str, torch.Tensor], name: str = "adapter_model.safetensors", **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in values.items()}, folder / name)
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": 15, "peft_version": "0.21.2"} | config
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))
    return folder


def pair(module: str, a: torch.Tensor = A, b: torch.Tensor = B) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}


def added(
    folder: Path, adapter: Path, shapes: dict[str, tuple[int, ...]], **config: Any
) -> dict[str, torch.Tensor]:
    """What merging adds to each weight of a base of zeros, over the scaling."""
    options = {k: config.pop(k) for k in ("expert_packing", "expert_layout") if k in config}
    base = handmade_base(folder / "base", shapes, **config)
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, base / "model.safetensors", {"format": "pt"})
    merge(base, [AdapterChoice(adapter)], folder / "out", MergeOptions(**options))
    return {name: value.double() / S for name, value in tensors(folder / "out").items()}


def same(found: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(found, exact.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.{q}.lora_{x}.weight",  # PEFT, and all who call its save_pretrained
        "base_model.model.{q}.lora_{x}.default.weight",  # a state_dict saved by hand
        "{q}.lora_{x}.default.weight",  # ms-swift's own format
        "base_model.model.{q}.lora_{x}.actor.weight",  # an adapter with a name
        "base_model.model._orig_mod.{q}.lora_{x}.weight",  # torch.compile
        "_orig_mod.base_model.model.{q}.lora_{x}.weight",
        "base_model.model.model._checkpoint_wrapped_module.layers.0.self_attn.q_proj.lora_{x}.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_{x}.weight",
        "module.base_model.model.{q}.lora_{x}.weight",  # DDP
        "pretrained_model.base_model.model.{q}.lora_{x}.weight",  # TRL with a value head
        "model_state.model.base_model.model.{q}.lora_{x}.default.weight",  # a distributed checkpoint
        "base_model.model.base_model.model.{q}.lora_{x}.weight",  # wrapped twice
    ],
)
def test_trainer_tensor_names_are_mapped(tmp_path: Path, key: str) -> None:
    values = {key.format(q=Q, x=x): value for x, value in (("A", A), ("B", B))}
    found = added(tmp_path, save(tmp_path / "adapter", values), {f"{Q}.weight": (8, 10)})
    same(found[f"{Q}.weight"], B @ A)


def test_trainer_embeddings_and_saved_modules_are_mapped(tmp_path: Path) -> None:
    head, down, up = torch.randn(11, 10), torch.randn(R, 11), torch.randn(10, R)
    values = {
        "base_model.model.lm_head.modules_to_save.actor.weight": head,
        "base_model.model.model.embed_tokens.lora_embedding_A.actor": down,
        "base_model.model.model.embed_tokens.lora_embedding_B.actor": up,
    }
    adapter = save(tmp_path / "adapter", values, modules_to_save=["lm_head"])
    found = added(tmp_path, adapter, {"model.embed_tokens.weight": (11, 10), "lm_head.weight": (11, 10)})
    same(found["lm_head.weight"] * S, head)
    same(found["model.embed_tokens.weight"], (up @ down).T)


def test_tinker_unembed_tokens_is_head(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", pair("model.unembed_tokens", A, B), peft_type="absent")
    found = added(tmp_path, adapter, {"model.embed_tokens.weight": (8, 10), "lm_head.weight": (8, 10)})
    same(found["lm_head.weight"], B @ A)
    assert not found["model.embed_tokens.weight"].any()


UNSLOTH = {
    "auto_mapping": {"base_model_class": "X", "parent_library": "y", "unsloth_fixed": True},
    "use_bdlora": None,
}
AXOLOTL = {"nvfp4_merge_aware": {"scale_mode": "x", "start_step": 1}, "layer_replication": None}
LLAMA_FACTORY = {"init_lora_weights": True, "use_rslora": False, "modules_to_save": None}
OLD_PEFT = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "peft_version": "absent"}


@pytest.mark.parametrize(
    "config",
    [
        UNSLOTH, AXOLOTL, LLAMA_FACTORY, OLD_PEFT,
        {"peft_type": "absent"},  # Tinker, and files written by hand
        {"peft_type": "absent", "swift_type": "LORA", "use_qa_lora": False, "lora_dtype": "AUTO"},
        {"target_modules": r"^(model\.layers.*)\.(q_proj)$"},  # ms-swift
        {"peft_version": "absent", "base_model_name_or_path": "x"},  # torchtune
    ],
    ids=["unsloth", "axolotl", "llama-factory", "old peft", "no type", "swift", "swift regex", "torchtune"],
)  # fmt: skip
def test_trainer_configurations_are_read(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = save(tmp_path / "adapter", pair(Q), **config)
    (adapter / "additional_config.json").write_text('{"lora_dtype": null}')  # ms-swift's
    same(added(tmp_path, adapter, {f"{Q}.weight": (8, 10)})[f"{Q}.weight"], B @ A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stem", ["adapter_model", "model"])
def test_sharded_adapter_is_read(tmp_path: Path, stem: str, dtype: torch.dtype) -> None:
    """axolotl's, from FSDP shards; before its pull request 3585 the files were named like a model's."""
    folder, values = tmp_path / "adapter", {k: v.to(dtype) for k, v in pair(Q).items()}
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for (key, value), name in zip(values.items(), names, strict=True):
        save(folder, {key: value}, name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(values, names, strict=True))}))
    same(
        added(tmp_path, folder, {f"{Q}.weight": (8, 10)})[f"{Q}.weight"],
        (B.to(dtype).float() @ A.to(dtype).float()),
    )
    (folder / names[1]).unlink()
    with pytest.raises(LoraExportError, match="names the shard"):
        added(tmp_path / "again", folder, {f"{Q}.weight": (8, 10)})


def test_adapter_in_model_safetensors_is_read(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", pair(Q), "model.safetensors")
    same(added(tmp_path, adapter, {f"{Q}.weight": (8, 10)})[f"{Q}.weight"], B @ A)


@pytest.mark.parametrize(
    ("trained", "stored"),
    [
        ("model.layers.0.x", "model.language_model.layers.0.x"),
        ("language_model.model.layers.0.x", "model.language_model.layers.0.x"),
        ("model.language_model.layers.0.x", "model.layers.0.x"),
        ("visual.blocks.0.x", "model.visual.blocks.0.x"),
    ],
)
def test_text_adapter_fits_vision_language_model(tmp_path: Path, trained: str, stored: str) -> None:
    adapter = save(tmp_path / "adapter", pair(trained))
    found = added(tmp_path, adapter, {f"{stored}.weight": (8, 10), "lm_head.weight": (3, 10)})
    same(found[f"{stored}.weight"], B @ A)


# --- experts -----------------------------------------------------------------------------------------------


def stacks() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tinker's projections: the inputs of w1 and w3 and the outputs of w2 are shared by all experts."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "w1": (normal(1, R, WIDTH), normal(EXPERTS, HEIGHT, R)),
        "w3": (normal(1, R, WIDTH), normal(EXPERTS, HEIGHT, R)),
        "w2": (normal(EXPERTS, R, HEIGHT), normal(1, WIDTH, R)),
    }


def expected(name: str, expert: int) -> torch.Tensor:
    a, b = stacks()[name]
    return b[expert % len(b)].double() @ a[expert % len(a)].double()


def stacked(folder: Path) -> Path:
    values: dict[str, torch.Tensor] = {}
    for name, (a, b) in stacks().items():
        values |= pair(f"model.layers.0.mlp.experts.{name}", a, b)
    return save(folder, values, peft_type="absent")


def single(folder: Path, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Path:
    """The same, an expert at a time: old PEFT on unfused models, Automodel, prime-rl."""
    values: dict[str, torch.Tensor] = {}
    for ours, (a, b) in zip(names, stacks().values(), strict=True):
        for e in range(EXPERTS):
            values |= pair(f"model.layers.0.mlp.experts.{e}.{ours}", a[e % len(a)], b[e % len(b)])
    return save(folder, values)


@pytest.mark.parametrize("write", [stacked, single, lambda f: single(f, ("w1", "w3", "w2"))])
def test_adapter_fits_experts_stored_one_by_one(tmp_path: Path, write: Any) -> None:
    parts = {
        "gate_proj": ("w1", HEIGHT, WIDTH),
        "up_proj": ("w3", HEIGHT, WIDTH),
        "down_proj": ("w2", WIDTH, HEIGHT),
    }
    shapes = {
        f"model.layers.0.mlp.experts.{e}.{part}.weight": (out, width)
        for e in range(EXPERTS)
        for part, (_, out, width) in parts.items()
    }
    found = added(tmp_path, write(tmp_path / "adapter"), shapes, model_type="qwen3_moe")
    for e in range(EXPERTS):
        for part, (name, _, _) in parts.items():
            same(found[f"model.layers.0.mlp.experts.{e}.{part}.weight"], expected(name, e))


@pytest.mark.parametrize("write", [stacked, single])
@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "llama4_text", "gpt_oss"])
def test_adapter_fits_experts_stored_fused(tmp_path: Path, write: Any, model_type: str) -> None:
    """Out-in with gate before up; Llama 4 transposed; gpt-oss transposed, and gate and up alternate."""
    flip = model_type != "qwen3_5_moe"
    up, down = (EXPERTS, 2 * HEIGHT, WIDTH), (EXPERTS, WIDTH, HEIGHT)
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (up[0], up[2], up[1]) if flip else up,
        "model.layers.0.mlp.experts.down_proj": (down[0], down[2], down[1]) if flip else down,
    }
    found = added(tmp_path, write(tmp_path / "adapter"), shapes, model_type=model_type)
    fused, second = (v.transpose(1, 2) if flip else v for v in (found[n] for n in shapes))
    for e in range(EXPERTS):
        gate, lift = (
            (fused[e, ::2], fused[e, 1::2]) if model_type == "gpt_oss" else (fused[e, :HEIGHT], fused[e, HEIGHT:])
        )
        same(gate, expected("w1", e))
        same(lift, expected("w3", e))
        same(second[e], expected("w2", e))


def test_unsloth_gpt_oss_4bit_adapter_merges(tmp_path: Path) -> None:
    """Its loader takes the experts apart; the outputs stay in the base's own order."""
    a, b = torch.randn(R, WIDTH), torch.randn(2 * HEIGHT, R)
    adapter = save(tmp_path / "adapter", pair("model.layers.0.mlp.experts.gate_up_projs.2", a, b))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = added(tmp_path, adapter, {name: (EXPERTS, WIDTH, 2 * HEIGHT)}, model_type="gpt_oss")[name]
    same(found[2], (b @ a).T)
    assert not found[[0, 1, 3]].any()


def test_square_experts_follow_architecture(tmp_path: Path) -> None:
    a, b = torch.randn(R, 8), torch.randn(8, R)
    adapter = save(tmp_path / "adapter", pair("model.layers.0.mlp.experts.1.down_proj", a, b))
    name = "model.layers.0.mlp.experts.down_proj"
    for model_type, flip in (("llama4_text", True), ("qwen3_5_moe", False)):
        found = added(tmp_path / model_type, adapter, {name: (2, 8, 8)}, model_type=model_type)[name]
        same(found[1], (b @ a).T if flip else b @ a)


def test_stacked_experts_are_read(tmp_path: Path) -> None:
    """SGLang's form with a shared input."""
    a, b = torch.randn(1, R, WIDTH), torch.randn(EXPERTS, 2 * HEIGHT, R)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    adapter = save(tmp_path / "adapter", pair(name, a, b))
    found = added(tmp_path, adapter, {name: (EXPERTS, 2 * HEIGHT, WIDTH)}, model_type="qwen3_5_moe")[name]
    same(found, torch.stack([b[e] @ a[0] for e in range(EXPERTS)]))


TARGET = "model.layers.0.mlp.experts.down_proj"


def fused(folder: Path, **config: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """LoRA on a fused parameter, and its delta for either packing."""
    a, b = torch.randn(EXPERTS * R, HEIGHT), torch.randn(WIDTH, EXPERTS * R)
    settings = {"target_parameters": ["mlp.experts.down_proj"]} | config
    adapter = save(folder, pair("model.layers.0.mlp.experts", a, b), **settings)

    def delta(columns: Any) -> torch.Tensor:
        return torch.stack([b[:, columns(e)].double() @ a[e * R : (e + 1) * R].double() for e in range(EXPERTS)])

    by_rank = delta(lambda e: [j * EXPERTS + e for j in range(R)])
    return adapter, {"rank": by_rank, "expert": delta(lambda e: [e * R + j for j in range(R)])}


def noted(layout: str) -> dict[str, Any]:
    return {"unsloth_fused_expert_lora": {"parameters": {"down_proj": {"lora_B_layout": layout}}}}


MEGATRON = {"target_parameters": ["model.layers.0.mlp.experts.down_proj"], "peft_version": "absent"}


@pytest.mark.parametrize(
    ("config", "option", "packing"),
    [
        ({}, "auto", "rank"),
        ({}, "expert", "expert"),
        (UNSLOTH | {"lora_B_layout": "grouped_by_expert"}, "auto", "expert"),
        (UNSLOTH | {"lora_B_layout": "rank_major"}, "auto", "rank"),
        (UNSLOTH | noted("grouped_by_expert"), "auto", "expert"),
        (UNSLOTH | noted("rank_major") | {"lora_B_layout": "grouped_by_expert"}, "rank", "rank"),
        (UNSLOTH, "expert", "expert"),
        (UNSLOTH, "rank", "rank"),
        (MEGATRON, "expert", "expert"),
    ],
)
def test_expert_packing_option_is_applied(
    tmp_path: Path, config: dict[str, Any], option: str, packing: str
) -> None:
    adapter, deltas = fused(tmp_path / "adapter", **config)
    found = added(tmp_path, adapter, {TARGET: (EXPERTS, WIDTH, HEIGHT)}, expert_packing=option)
    same(found[TARGET], deltas[packing])


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "option", "told"),
    [
        (UNSLOTH, "auto", "Unsloth has packed B of fused experts in two ways"),
        (MEGATRON, "auto", "Megatron-Bridge has packed B"),
        (UNSLOTH | noted("mixed"), "auto", "lora_B_layout of down_proj is 'mixed'"),
        (UNSLOTH | noted("rank_major"), "expert", "says that down_proj is packed by rank"),
    ],
)
def test_ambiguous_expert_packing_is_refused(
    tmp_path: Path, config: dict[str, Any], option: str, told: str
) -> None:
    adapter, _ = fused(tmp_path / "adapter", **config)
    with pytest.raises(LoraExportError, match=told) as refusal:
        added(tmp_path, adapter, {TARGET: (EXPERTS, WIDTH, HEIGHT)}, expert_packing=option)
    assert refusal.value.next_step and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "config", "told"),
    [
        (pair(Q) | {f"base_model.model.{Q}.lora_A.other.weight": A}, {}, "two tensors have the same meaning"),
        (
            {f"{Q}.lora_A.one.weight": A, f"{Q}.lora_B.one.weight": B, f"{Q}.lora_A.two.weight": A},
            {},
            "several adapters: one, two",
        ),
        (pair(Q) | {f"base_model.model.{Q}.lora_A.weight": torch.empty(0)}, {}, "ZeRO-3"),
        (
            pair(Q) | {"base_model.model.lm_head.weight": torch.empty(0)},
            {"modules_to_save": ["lm_head"]},
            "ZeRO-3",
        ),
        (pair(Q), {"lora_alpha": 0}, "lora_alpha is 0"),
        (pair(Q), {"enable_lora": [True, False, True]}, "enable_lora"),
        (pair(Q), {"peft_type": "absent", "swift_type": "LLAMAPRO"}, "peft_type is 'LLAMAPRO'"),
        (pair(Q) | {"base_model.model.v_head.summary.weight": A}, {}, "no adapter kind accounts"),
        (pair("model.layers.0.mlp.experts.w1", A[None], B[None]), {}, "the shapes do not match"),
        ({f"base_model.model.{Q}.lora_a.weight": A}, {}, "no tensors of the kind LORA"),  # torchtune's own
    ],
)
def test_unsupported_adapter_files_are_refused(
    tmp_path: Path, values: dict[str, torch.Tensor], config: dict[str, Any], told: str
) -> None:
    adapter = save(tmp_path / "adapter", values, **config)
    with pytest.raises(LoraExportError, match=told):
        added(tmp_path, adapter, {f"{Q}.weight": (8, 10), "lm_head.weight": (3, 10)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "weights", "told"),
    [
        ("vit.safetensors", True, "trained the vision tower in full"),
        ("extra_states", True, "trained other weights in full"),
        ("pytorch_lora_weights.safetensors", False, "a diffusers adapter"),
        ("pytorch_model_fsdp_0", False, "unmerged FSDP shards"),
        ("zero_to_fp32.py", False, "unmerged DeepSpeed shards"),
        ("adapter_model.pt", False, "the adapter is pickled"),
        ("adapter_model.bin", False, "the adapter is pickled"),
    ],
)
def test_unsupported_adapter_folders_are_refused(tmp_path: Path, name: str, weights: bool, told: str) -> None:
    adapter = save(tmp_path / "adapter", pair(Q))
    (adapter / name).write_bytes(b"")
    if not weights:
        (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(LoraExportError, match=told) as refusal:
        added(tmp_path, adapter, {f"{Q}.weight": (8, 10)})
    assert refusal.value.next_step


@pytest.mark.parametrize("name", ["pissa_init", "pissa_backup"])
def test_llama_factory_residual_folder_is_recognized(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoraExportError, match=name) as refusal:
        added(tmp_path, save(tmp_path / name, pair(Q)), {f"{Q}.weight": (8, 10)})
    assert "pissa_converted" in str(refusal.value)


def test_adapter_in_subfolder_is_suggested(tmp_path: Path) -> None:
    save(tmp_path / "swift" / "default", pair(Q))
    with pytest.raises(LoraExportError, match="swift/default"):
        added(tmp_path, tmp_path / "swift", {f"{Q}.weight": (8, 10)})


def test_wrong_number_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraExportError, match="fits expert 3"):
        added(
            tmp_path,
            single(tmp_path / "adapter"),
            {
                "model.layers.0.mlp.experts.gate_up_proj": (3, 2 * HEIGHT, WIDTH),
                "model.layers.0.mlp.experts.down_proj": (3, WIDTH, HEIGHT),
            },
        )


def test_inspect_names_adapter_in_keys(tmp_path: Path) -> None:
    from lora_export.workflows.inspection import inspect_folder

    values = {k.replace(".weight", ".actor.weight"): v for k, v in pair(Q).items()}
    adapter = save(tmp_path / "adapter", values)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="owner/base")
    told = inspect_folder(adapter)
    assert told["mergeable"] and told["ranks"] == {"3": 1} and "owner/base" in told["summary"]
    assert load_file(adapter / "adapter_model.safetensors").keys() == values.keys()
