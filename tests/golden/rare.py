"""What the rarer kinds of PEFT refuse: cases of test_refusals."""

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Case = tuple[dict[str, Any], Shapes, tuple[int, ...] | None]

MISS = {"peft_type": "MISS", "r": 2, "init_weights": True}
HRA = {"peft_type": "HRA", "r": 2, "apply_GS": False}
FOURIER = {"peft_type": "FOURIERFT", "scaling": 150.0, "random_loc_seed": 777}
VBLORA = {"peft_type": "VBLORA", "r": 2, "topk": 2}
RANDLORA = {"peft_type": "RANDLORA", "r": 2, "randlora_alpha": 4, "save_projection": True}
ROAD = {"peft_type": "ROAD", "variant": "road_1", "group_size": 4}
SHIRA = {"peft_type": "SHIRA", "r": 1}
WAVE = {"peft_type": "WAVEFT", "scaling": 25.0, "random_loc_seed": 777, "use_idwt": True, "wavelet_family": "db1"}
DELORA = {"peft_type": "DELORA", "r": 2}
GRALORA = {"peft_type": "GRALORA", "r": 4, "alpha": 8, "gralora_k": 2, "hybrid_r": 0}

BANK = {"vblora_vector_bank": (5, 3), "x.vblora_logits_A": (2, 4, 5), "x.vblora_logits_B": (6, 2, 5)}
SHORT = {
    "vblora_vector_bank": (5, 3),
    "x.vblora_logits_A_topk_indices": (2, 4, 2), "x.vblora_logits_A_topk_weights": (2, 4, 1),
    "x.vblora_logits_B_topk_indices": (6, 2, 2), "x.vblora_logits_B_topk_weights": (6, 2, 1),
}  # fmt: skip
BASES = {
    "randlora_A": (2, 1, 6), "randlora_B": (8, 3, 2), "x.randlora_lambda": (2, 3), "x.randlora_gamma": (3, 6),
}  # fmt: skip
PAIRS = {"x.road_theta": (4,), "x.road_alpha": (4,)}
SPARSE = {"x.shira_weight": (5,), "x.shira_indices": (2, 5)}
BOUNDED = {"x.delora_A": (2, 6), "x.delora_B": (8, 2), "x.delora_lambda": (1,), "x.delora_w_norm": (6,)}
BLOCKS = {"x.gralora_A": (2, 3, 4), "x.gralora_B": (2, 4, 5)}
WIDE = {"x.gralora_A_general.weight": (3, 6), "x.gralora_B_general.weight": (10, 3)}


def _without(shapes: Shapes, *names: str) -> Shapes:
    return {k: v for k, v in shapes.items() if k not in names}


CASES: dict[str, Case] = {
    "miss: a form that nobody knows": (MISS | {"init_weights": "mono"}, {"x.miss_block": (2, 8)}, None),
    "miss: another rank": (MISS | {"r": 3}, {"x.miss_block": (2, 8)}, None),
    "miss: a block of bat": (MISS, {"x.miss_block": (4, 2, 2)}, None),
    "miss: bat without blocks": (MISS | {"init_weights": "bat"}, {"x.miss_block": (2, 8)}, None),
    "miss: bat of another rank": (MISS | {"init_weights": "bat"}, {"x.miss_block": (4, 3, 3)}, None),
    "miss: another mini_r": (MISS | {"init_weights": "mini", "mini_r": 3}, {"x.miss_block": (2, 2)}, None),
    "miss: no mini_r": (MISS | {"init_weights": "mini"}, {"x.miss_block": (2, 2)}, None),
    "bone: a block under the new name": (MISS | {"peft_type": "BONE"}, {"x.miss_block": (2, 8)}, None),
    "hra: another rank": (HRA | {"r": 3}, {"x.hra_u": (6, 2)}, None),
    "hra: whether orthogonal is not said": (HRA | {"apply_GS": None}, {"x.hra_u": (6, 2)}, None),
    "hra: equal vectors made orthogonal": (HRA | {"apply_GS": True}, {"x.hra_u": (6, 2)}, (8, 6)),
    "fourierft: no seed": (FOURIER | {"random_loc_seed": None}, {"x.fourierft_spectrum": (9,)}, None),
    "fourierft: no scaling": (FOURIER | {"scaling": None}, {"x.fourierft_spectrum": (9,)}, None),
    "fourierft: a matrix": (FOURIER, {"x.fourierft_spectrum": (3, 3)}, None),
    "vblora: no bank": (VBLORA, _without(BANK, "vblora_vector_bank"), None),
    "vblora: one side": (VBLORA, _without(BANK, "x.vblora_logits_B"), None),
    "vblora: saved short, and not said": (VBLORA, SHORT, None),
    "vblora: said to be short": (VBLORA | {"save_only_topk_weights": True}, BANK, None),
    "vblora: another rank": (VBLORA | {"r": 3}, BANK, None),
    "vblora: another number of vectors": (VBLORA, BANK | {"vblora_vector_bank": (6, 3)}, None),
    "vblora: more than there are": (VBLORA | {"topk": 6}, BANK, None),
    "vblora: another topk": (VBLORA | {"save_only_topk_weights": True, "topk": 3}, SHORT, None),
    "vblora: an index out of range": (
        VBLORA | {"save_only_topk_weights": True, "topk": 1},
        {
            "vblora_vector_bank": (1, 3),
            "x.vblora_logits_A_topk_indices": (2, 4, 1), "x.vblora_logits_A_topk_weights": (2, 4, 0),
            "x.vblora_logits_B_topk_indices": (6, 2, 1), "x.vblora_logits_B_topk_weights": (6, 2, 0),
        },
        (18, 12),
    ),
    "randlora: one scale": (RANDLORA, _without(BASES, "x.randlora_gamma"), None),
    "randlora: no bases": (RANDLORA, _without(BASES, "randlora_A", "randlora_B"), None),
    "randlora: bases of another rank": (RANDLORA, BASES | {"randlora_A": (3, 1, 6)}, None),
    "randlora: another number of bases": (RANDLORA, BASES | {"x.randlora_lambda": (2, 2)}, None),
    "randlora: bases that are not used": (RANDLORA | {"save_projection": False}, BASES, None),
    "randlora: no seed": (
        RANDLORA | {"save_projection": False, "projection_prng_key": "7"},
        _without(BASES, "randlora_A", "randlora_B"), None,
    ),
    "randlora: sizes that only a base tells": (
        RANDLORA | {"save_projection": False, "projection_prng_key": 7},
        _without(BASES, "randlora_A", "randlora_B"), (8, 6),
    ),
    "randlora: a copy of another shape": (RANDLORA, BASES | {"x.randlora_A": (2, 1, 7)}, (8, 6)),
    "road: another variant": (ROAD | {"variant": "road_3"}, PAIRS, None),
    "road: an odd group": (ROAD | {"group_size": 3}, PAIRS, None),
    "road: no stretch": (ROAD, _without(PAIRS, "x.road_alpha"), None),
    "road: half a group": (ROAD | {"group_size": 6}, PAIRS, None),
    "road: fewer stretches than turns": (ROAD, PAIRS | {"x.road_alpha": (2,)}, None),
    "shira: no places": (SHIRA, _without(SPARSE, "x.shira_indices"), None),
    "shira: fewer places than values": (SHIRA, SPARSE | {"x.shira_indices": (2, 4)}, None),
    "shira: another rank": (SHIRA | {"r": 2}, SPARSE, None),
    "shira: outside of the weight": (SHIRA, SPARSE, (1, 8)),
    "shira: outside of any weight": (SHIRA, SPARSE, (1, 1)),
    "c3a: a matrix": ({"peft_type": "C3A"}, {"x.c3a_kernel": (4, 3)}, None),
    "waveft: another family": (WAVE | {"wavelet_family": "bior2.2"}, {"x.waveft_spectrum": (9,)}, None),
    "waveft: a family whose filters PEFT pads for another length": (
        WAVE | {"wavelet_family": "coif5"}, {"x.waveft_spectrum": (9,)}, None,
    ),
    "waveft: a family without filters": (WAVE | {"wavelet_family": "db11"}, {"x.waveft_spectrum": (9,)}, None),
    "waveft: no family": (WAVE | {"wavelet_family": ["db1"]}, {"x.waveft_spectrum": (9,)}, None),
    "waveft: whether transformed is not said": (WAVE | {"use_idwt": None}, {"x.waveft_spectrum": (9,)}, None),
    "waveft: a seed that is a word": (WAVE | {"random_loc_seed": "1"}, {"x.waveft_spectrum": (9,)}, None),
    "delora: no norms": (DELORA, _without(BOUNDED, "x.delora_w_norm"), None),
    "delora: another rank": (DELORA | {"rank_pattern": {"x": 3}}, BOUNDED, None),
    "delora: a bound for each rank": (DELORA, BOUNDED | {"x.delora_lambda": (2,)}, None),
    "gralora: one side": (GRALORA, _without(BLOCKS, "x.gralora_A"), None),
    "gralora: another number of blocks": (GRALORA | {"gralora_k": 4}, BLOCKS, None),
    "gralora: a rank that does not divide": (
        GRALORA | {"r": 3}, {"x.gralora_A": (2, 3, 3), "x.gralora_B": (2, 3, 5)}, None,
    ),
    "gralora: a hybrid without its matrices": (GRALORA | {"hybrid_r": 3}, BLOCKS, None),
    "gralora: matrices that are not used": (GRALORA, BLOCKS | WIDE, None),
    "gralora: a hybrid of another rank": (GRALORA | {"hybrid_r": 2}, BLOCKS | WIDE, None),
}  # fmt: skip
WEIGHTED: dict[str, tuple[dict[str, Any], Shapes]] = {
    "miss": (MISS, {"x.miss_block": (2, 8)}),
    "hra": (HRA, {"x.hra_u": (6, 2)}),
    "road": (ROAD, PAIRS),
    "ln_tuning": ({"peft_type": "LN_TUNING"}, {"x.ln_tuning_layers.weight": (6,)}),
}
