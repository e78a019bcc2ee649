"""What more of PEFT's rarer kinds refuse; test_refusals.py asks."""

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Case = tuple[dict[str, Any], Shapes, tuple[int, ...] | None]


def without(shapes: Shapes, *names: str) -> Shapes:
    return {k: v for k, v in shapes.items() if k not in names}


ADAMSS = {"peft_type": "ADAMSS", "r": 4, "num_subspaces": 2, "random_seed": 0}
DEFT = {"peft_type": "DEFT", "r": 4, "alpha": 8, "decomposition_method": "relu", "para": False}
GLORA = {"peft_type": "GLORA", "r": 4, "config_A_B": "lora", "config_C": "vector", "config_D_E": "constant"}
HIRA = {"peft_type": "HIRA", "r": 4, "rank_pattern": {}}
PEANUT = {"peft_type": "PEANUT", "r": 4, "depth": 1, "act_fn": "relu", "scaling": 2.0}
PSOFT = {
    "peft_type": "PSOFT", "r": 4, "psoft_alpha": 8, "ab_svd_init": "psoft_init", "psoft_svd": "full",
    "psoft_orth": True, "psoft_mag_a": True, "psoft_mag_b": False, "use_cayley_neumann": False,
}  # fmt: skip
PVERA = {"peft_type": "PVERA", "r": 4, "save_projection": True, "sample_at_inference": False}
SUPER: dict[str, Any] = {"peft_type": "SUPERTUNING", "r": None}
TINY = {
    "peft_type": "TINYLORA", "r": 4, "u": 3, "weight_tying": 0.0, "projection_seed": 1, "save_projection": True,
}  # fmt: skip
UNI = {"peft_type": "UNILORA", "r": 4, "theta_d_length": 9, "proj_seed": 1, "save_indices": False}

CLUSTERS = {
    "x.adamss_newB": (4, 7), "x.adamss_A.0": (2, 4), "x.adamss_B.0": (5, 2), "x.adamss_A.1": (1, 4),
    "x.adamss_B.1": (3, 1),
}  # fmt: skip
PATHS: Shapes = {
    "x.glora_A.Xd": (8, 4), "x.glora_A.Xu": (4, 6), "x.glora_B.Xd": (8, 4), "x.glora_B.Xu": (4, 6),
    "x.glora_C.X": (6, 1), "x.glora_D.X": (1,), "x.glora_E.X": (1,),
}  # fmt: skip
HADAMARD = {"x.hira_A": (4, 6), "x.hira_B": (8, 4)}
PROJECTED = {"x.deft_P": (8, 4), "x.deft_R": (4, 6)}
ROTATED = {
    "a.x.frod_lambda_l": (6,), "a.x.frod_lambda_s_values": (3,), "frod_V.a_x": (6, 6), "frod_s_indices.a_x": (2, 3),
    "frod_s_size.a_x": (2,),
}  # fmt: skip
NETWORK = {
    "x.peanut_A.weight": (4, 8), "x.peanut_B.weight": (8, 4), "x.peanut_encoders.0.weight": (4, 4),
    "x.peanut_decoders.0.weight": (4, 4),
}  # fmt: skip
TURN = {"x.psoft_R.weight": (6,), "x.psoft_R.vector_a": (4,)}
REMAINDER = {f"x.osf_svd_params.{n}_low": s for n, s in (("U", (8, 3)), ("S", (3,)), ("V", (3, 6)))}
SPARSE = {"x.supertuning_indices": (5,), "x.supertuning_values": (5,)}
MEAN = {"x.pvera_lambda_b": (8,), "x.pvera_lambda_d": (8,), "pvera_A": (8, 6), "pvera_B": (8, 4)}
SMALL = {"x.tinylora_A": (4, 6), "x.tinylora_B": (8, 4), "x.tinylora_P": (3, 4, 4), "tinylora_v.0": (3,)}
THETA = {"unilora_theta_d": (9,)}
INDEXED = THETA | {f"x.unilora_{n}": s for n, s in (
    ("indices_A", (4, 6)), ("indices_B", (8, 4)), ("scales_A", (4, 6)), ("scales_B", (8, 4)),
)}  # fmt: skip

CASES: dict[str, Case] = {
    "adamss: no seed": (ADAMSS | {"random_seed": None}, CLUSTERS, None),
    "adamss: B of another rank": (ADAMSS, CLUSTERS | {"x.adamss_B.1": (3, 2)}, None),
    "adamss: a part is missing": (ADAMSS, without(CLUSTERS, "x.adamss_A.1"), None),
    "adamss: other subspaces than configured": (ADAMSS | {"num_subspaces": 3}, CLUSTERS, None),
    "beft: a vector": ({"peft_type": "BEFT"}, {"x.beft_bias": (8,)}, None),
    "deft: no R": (DEFT, without(PROJECTED, "x.deft_R"), None),
    "deft: R with para": (DEFT | {"para": True}, PROJECTED, None),
    "deft: another rank": (DEFT, PROJECTED | {"x.deft_R": (3, 6)}, None),
    "deft: another way to project": (DEFT | {"decomposition_method": "svd"}, PROJECTED, None),
    "deft: para is missing": (without(DEFT, "para"), PROJECTED, None),
    "frod: no projections": (
        {"peft_type": "FROD", "save_projection": False},
        without(ROTATED, "frod_V.a_x", "frod_s_indices.a_x", "frod_s_size.a_x"),
        None,
    ),
    "frod: places for other values": ({"peft_type": "FROD"}, ROTATED | {"frod_s_indices.a_x": (2, 4)}, None),
    "glora: a path is missing": (GLORA, without(PATHS, "x.glora_E.X"), None),
    "glora: half of a path": (GLORA, without(PATHS, "x.glora_A.Xu"), None),
    "glora: another form than configured": (GLORA | {"config_A_B": "vector"}, PATHS, None),
    "glora: an unknown form": (GLORA | {"config_C": "matrix"}, PATHS, None),
    "glora: another rank": (GLORA | {"r": 5}, PATHS, None),
    "glora: paths of two sizes": (GLORA, PATHS | {"x.glora_C.X": (7, 1)}, None),
    "hira: half a pair": (HIRA, without(HADAMARD, "x.hira_B"), None),
    "hira: ranks that disagree": (HIRA, HADAMARD | {"x.hira_B": (8, 3)}, None),
    "hira: another rank than configured": (HIRA | {"r": 5}, HADAMARD, None),
    "osf: a part is missing": ({"peft_type": "OSF"}, without(REMAINDER, "x.osf_svd_params.S_low"), None),
    "osf: more directions than there are": (
        {"peft_type": "OSF"},
        {f"x.osf_svd_params.{n}_low": s for n, s in (("U", (8, 7)), ("S", (7,)), ("V", (7, 6)))},
        None,
    ),
    "peanut: a decoder is missing": (PEANUT, without(NETWORK, "x.peanut_decoders.0.weight"), None),
    "peanut: another depth": (PEANUT | {"depth": 2}, NETWORK, None),
    "peanut: an activation with parameters": (PEANUT | {"act_fn": "xielu"}, NETWORK, None),
    "peanut: another rank": (PEANUT, NETWORK | {"x.peanut_encoders.0.weight": (4, 3)}, None),
    "psoft: a vector that is not configured": (PSOFT, TURN | {"x.psoft_R.vector_b": (4,)}, None),
    "psoft: another rank": (PSOFT | {"r": 5}, TURN, None),
    "psoft: an unknown start": (PSOFT | {"ab_svd_init": "random"}, TURN, None),
    "psoft: no seed": (PSOFT | {"psoft_svd": "lowrank"}, TURN, None),
    "psoft: a series without an end": (
        PSOFT | {"use_cayley_neumann": True, "num_cayley_neumann_terms": 10**6}, TURN, None,
    ),
    "pvera: drawn at inference": (PVERA | {"sample_at_inference": True}, MEAN, None),
    "pvera: no projection": (PVERA, without(MEAN, "pvera_A"), None),
    "pvera: half of A": (PVERA, MEAN | {"pvera_A": (4, 6)}, None),
    "pvera: half of λ": (PVERA, MEAN | {"x.pvera_lambda_d": (4,)}, None),
    "supertuning: no places": (SUPER, without(SPARSE, "x.supertuning_indices"), None),
    "supertuning: places that are not saved": (SUPER | {"save_precomputed_indices": False}, SPARSE, None),
    "supertuning: more places than values": (SUPER, SPARSE | {"x.supertuning_indices": (6,)}, None),
    "supertuning: a rank without matrices": (SUPER | {"r": 4, "lora_alpha": 8}, SPARSE, None),
    "tinylora: another u": (TINY | {"u": 4}, SMALL, None),
    "tinylora: another rank": (TINY, SMALL | {"x.tinylora_A": (3, 6)}, None),
    "tinylora: a projection that is not saved": (TINY | {"save_projection": False}, SMALL, None),
    "tinylora: a share beyond one": (TINY | {"weight_tying": 1.5}, SMALL, None),
    "tinylora: more vectors than groups": (TINY, SMALL | {"tinylora_v.1": (3,)}, None),
    "unilora: no base": (UNI, THETA, None),
    "unilora: another length": (UNI | {"theta_d_length": 8}, THETA, None),
    "unilora: indices that are not saved": (UNI, INDEXED, None),
    "unilora: a part is missing": (UNI | {"save_indices": True}, without(INDEXED, "x.unilora_scales_B"), None),
    "unilora: another rank": (UNI | {"save_indices": True, "r": 3}, INDEXED, None),
    "lily": ({"peft_type": "LILY"}, {"x.lily_A.weight": (4, 6)}, None),
    "shadow": ({"peft_type": "SHADOW"}, {"shadow_head.weight": (4, 6)}, None),
}  # fmt: skip
WEIGHTED: dict[str, tuple[dict[str, Any], Shapes]] = {
    "deft": (DEFT, PROJECTED), "frod": ({"peft_type": "FROD"}, ROTATED), "glora": (GLORA, PATHS),
    "hira": (HIRA, HADAMARD), "osf": ({"peft_type": "OSF"}, REMAINDER), "peanut": (PEANUT, NETWORK),
    "psoft": (PSOFT, TURN),
}  # fmt: skip
