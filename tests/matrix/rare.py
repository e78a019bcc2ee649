"""PEFT's rarer kinds, each on one family every day and on all of them by `make test-all`."""

from collections.abc import Callable
from typing import Any

import peft

from tests.matrix.families import Family

Kind = Callable[[Family], Any]
R, ALPHA = 4, 10


def _other(config: type, convolution: bool = False, conv1d: bool = False, **changes: Any) -> Kind:
    """conv1d: whether this configuration has fan_in_fan_out."""

    def build(family: Family) -> Any:
        modules = [family.convolution] if convolution else list(family.linear)
        if not modules or modules == [None]:
            return None
        settings = family.settings if conv1d and not convolution else {}
        return config(**{"target_modules": modules, **settings, **changes})

    return build


def _random_bases(**changes: Any) -> Kind:
    return _other(peft.RandLoraConfig, conv1d=True, r=5, randlora_alpha=ALPHA, projection_prng_key=7, **changes)


def _norms(family: Family) -> Any:
    return peft.LNTuningConfig(target_modules=[family.norm]) if family.norm else None


RARE: dict[str, Kind] = {
    "miss": _other(peft.MissConfig, r=5),
    "miss mini": _other(peft.MissConfig, r=4, mini_r=2, init_weights="mini"),
    "miss bat": _other(peft.MissConfig, r=4, init_weights="bat"),
    "miss bias": _other(peft.MissConfig, r=4, bias="miss_only"),
    "hra": _other(peft.HRAConfig, r=3, init_weights=False),
    "hra orthogonal": _other(peft.HRAConfig, r=3, init_weights=False, apply_GS=True),
    "hra convolution": _other(peft.HRAConfig, True, r=3, init_weights=False),
    "fourierft": _other(peft.FourierFTConfig, conv1d=True, n_frequency=60, n_frequency_pattern={"1.*": 41}),
    "fourierft seed": _other(peft.FourierFTConfig, conv1d=True, n_frequency=60, random_loc_seed=5, scaling=40.0),
    "vblora": _other(peft.VBLoRAConfig, conv1d=True, r=3, num_vectors=9, vector_length=4, topk=3),
    "vblora short": _other(
        peft.VBLoRAConfig, conv1d=True, r=3, num_vectors=9, vector_length=4, save_only_topk_weights=True
    ),
    "vblora one": _other(
        peft.VBLoRAConfig, conv1d=True, r=3, num_vectors=9, vector_length=4, topk=1, save_only_topk_weights=True
    ),
    "randlora": _random_bases(save_projection=True),
    "randlora regenerated": _random_bases(save_projection=False),
    "randlora sparse": _random_bases(save_projection=False, sparse=True),
    "randlora very sparse": _random_bases(save_projection=False, very_sparse=True),
    "road": _other(peft.RoadConfig, group_size=4),
    "road 2": _other(peft.RoadConfig, group_size=2, variant="road_2"),
    "road 4": _other(peft.RoadConfig, group_size=4, variant="road_4"),
    "shira": _other(peft.ShiraConfig, r=3, random_seed=3),
    "c3a": _other(peft.C3AConfig, block_size=4),
    "waveft": _other(peft.WaveFTConfig, conv1d=True, n_frequency=60),
    "waveft sym3": _other(
        peft.WaveFTConfig, conv1d=True, n_frequency=60, wavelet_family="sym3", proportional_parameters=True
    ),
    "waveft plain": _other(
        peft.WaveFTConfig, conv1d=True, n_frequency=60, use_idwt=False, random_loc_seed=4, scaling=2.5
    ),
    "delora": _other(peft.DeloraConfig, r=R, delora_lambda=7, rank_pattern={".*1.*": 3}, init_weights=False),
    "gralora": _other(peft.GraloraConfig, conv1d=True, r=R, alpha=ALPHA, gralora_k=2),
    "gralora wide": _other(peft.GraloraConfig, conv1d=True, r=24, alpha=ALPHA, gralora_k=4, hybrid_r=2),
    "gralora hybrid": _other(peft.GraloraConfig, conv1d=True, r=8, alpha=ALPHA, gralora_k=4, hybrid_r=3),
    "ln tuning": _norms,
}
