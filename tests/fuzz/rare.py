"""The rarer kinds of PEFT on the tiny base of `adapters`: (configuration, tensors)."""

from typing import Any

UP = "model.layers.0.mlp.up_proj"
CONV = "model.layers.0.conv"
VBLORA = {"peft_type": "VBLORA", "r": 2, "topk": 2, "num_vectors": 3, "vector_length": 2}
RANDLORA = {"peft_type": "RANDLORA", "r": 2, "randlora_alpha": 4, "projection_prng_key": 0, "sparse": False}
SCALES = {f"{UP}.randlora_lambda": (2, 2), f"{UP}.randlora_gamma": (2, 4)}

KINDS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "miss": ({"peft_type": "MISS", "r": 3, "init_weights": True}, {f"{UP}.miss_block": (3, 6)}),
    "miss mini": (
        {"peft_type": "MISS", "r": 3, "mini_r": 2, "init_weights": "mini"}, {f"{UP}.miss_block": (3, 2)},
    ),
    "bone bat": ({"peft_type": "BONE", "r": 2, "init_weights": "bat"}, {f"{UP}.bone_block": (3, 2, 2)}),
    "hra": (
        {"peft_type": "HRA", "r": 2, "apply_GS": True}, {f"{UP}.hra_u": (4, 2), f"{CONV}.hra_u": (36, 2)},
    ),
    "fourierft": (
        {"peft_type": "FOURIERFT", "scaling": 9.0, "random_loc_seed": 7}, {f"{UP}.fourierft_spectrum": (5,)},
    ),
    "vblora": (
        VBLORA,
        {"vblora_vector_bank": (3, 2), f"{UP}.vblora_logits_A": (2, 2, 3), f"{UP}.vblora_logits_B": (3, 2, 3)},
    ),
    "randlora": (
        RANDLORA | {"save_projection": True}, SCALES | {"randlora_A": (2, 1, 4), "randlora_B": (6, 2, 2)},
    ),
    "randlora drawn": (RANDLORA | {"save_projection": False}, SCALES),
    "road": (
        {"peft_type": "ROAD", "variant": "road_2", "group_size": 2},
        {f"{UP}.road_theta": (6,), f"{UP}.road_alpha": (6,)},
    ),
    "c3a": ({"peft_type": "C3A", "block_size": 2}, {f"{UP}.c3a_kernel": (3, 2, 2)}),
    "waveft": (
        {
            "peft_type": "WAVEFT", "scaling": 9.0, "random_loc_seed": 7, "use_idwt": True, "wavelet_family": "db2",
        },
        {f"{UP}.waveft_spectrum": (5,)},
    ),
    "delora": (
        {"peft_type": "DELORA", "r": 2, "rank_pattern": {"x": 3}},
        {
            f"{UP}.delora_A": (2, 4), f"{UP}.delora_B": (6, 2), f"{UP}.delora_lambda": (1,),
            f"{UP}.delora_w_norm": (4,),
        },
    ),
    "gralora": (
        {"peft_type": "GRALORA", "r": 2, "alpha": 4, "gralora_k": 2, "hybrid_r": 1},
        {
            f"{UP}.gralora_A": (2, 2, 2), f"{UP}.gralora_B": (2, 2, 3),
            f"{UP}.gralora_A_general.weight": (1, 4), f"{UP}.gralora_B_general.weight": (6, 1),
        },
    ),
    "ln tuning": ({"peft_type": "LN_TUNING"}, {"model.norm.ln_tuning_layers.weight": (4,)}),
}  # fmt: skip
MARKERS = sorted({
    key.removesuffix(".weight").rpartition(".")[2] for _, shapes in KINDS.values() for key in shapes
} | {"shira_weight", "shira_indices"})  # fmt: skip
