"""The words in which each kind of adapter refuses what it cannot merge, whole, as refusals.txt has them.

What is found, which tensor, what would be right and what to do next are all that a person has; a word that goes
missing is a fault. `python -m tests.golden.test_refusals` writes the file again: read the difference.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.errors import AdapterError
from tests.builders import updates_of
from tests.golden import more, rare
from tests.golden.more import without

GOLDEN = Path(__file__).with_name("refusals.txt")
Shapes = Mapping[str, tuple[int, ...]]
Case = tuple[dict[str, Any], Shapes, tuple[int, ...] | None]  # configuration, tensors, the weight that is asked for

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8}
IA3 = {"peft_type": "IA3", "feedforward_modules": ["up"]}
LOHA = {"peft_type": "LOHA", "r": 4, "alpha": 8}
LOKR = {"peft_type": "LOKR", "r": 4, "alpha": 8}
BOFT = {"peft_type": "BOFT", "boft_n_butterfly_factor": 1}

PAIR = {"x.lora_A.weight": (4, 6), "x.lora_B.weight": (8, 4)}
MAGNITUDE = "x.lora_magnitude_vector"
TRIPLE = {"x.lora_A": (4, 6), "x.lora_B": (8, 4), "x.lora_E": (4, 1)}
PRODUCTS = {"x.hada_w1_a": (8, 4), "x.hada_w1_b": (4, 6), "x.hada_w2_a": (8, 4), "x.hada_w2_b": (4, 6)}
TUCKER = {
    "x.hada_t1": (4, 4, 3), "x.hada_w1_a": (4, 8), "x.hada_w1_b": (4, 6),
    "x.hada_t2": (4, 4, 3), "x.hada_w2_a": (4, 8), "x.hada_w2_b": (4, 6),
}  # fmt: skip
KRONECKER = {"x.lokr_w1": (2, 3), "x.lokr_w2_a": (4, 4), "x.lokr_w2_b": (4, 2)}
CORE = {"x.lokr_w1": (2, 3), "x.lokr_w2_a": (4, 4), "x.lokr_w2_b": (4, 2), "x.lokr_t2": (4, 4, 3)}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
ATTENTION = {
    "x.base_layer.out_proj.lora_A.weight": (4, 8), "x.base_layer.out_proj.lora_B.weight": (8, 4),
    "x.lora_A.weight": (4, 8), "x.lora_B.weight": (24, 4),
}  # fmt: skip
BUTTERFLY = {"x.boft_R": (1, 2, 3, 3), "x.boft_s": (8, 1)}


CASES: dict[str, Case] = {
    "mlx: whole weights": (MLX | {"fine_tune_type": "full"}, {"x.weight": (8, 6)}, None),
    "mlx: a tensor of its base": (MLX, {"x.lora_a": (6, 4), "x.weight": (8, 6)}, None),
    "mlx: half a pair": (MLX, {"x.lora_a": (6, 4)}, None),
    "mlx: scale and alpha": (
        {"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 16}}, {"x.lora_a": (6, 4), "x.lora_b": (4, 8)}, None,
    ),
    "mlx: no scale": ({"lora_parameters": {"rank": 4}}, {"x.lora_a": (6, 4), "x.lora_b": (4, 8)}, None),
    "attention: without its in_proj": (
        LORA, {"x.base_layer.out_proj.lora_A.weight": (4, 8), "x.base_layer.out_proj.lora_B.weight": (8, 4)}, None,
    ),
    "attention: PiSSA": (LORA | {"init_lora_weights": "pissa"}, ATTENTION, None),
    "attention: ranks that disagree": (LORA, ATTENTION | {"x.lora_B.weight": (24, 3)}, None),
    "lora: half a pair": (LORA, without(PAIR, "x.lora_B.weight"), None),
    "lora: the other half": (LORA, without(PAIR, "x.lora_A.weight"), None),
    "lora: half a pair and a bias": (LORA, {"x.lora_B.weight": (8, 4), "x.lora_B.bias": (8,)}, None),
    "lora: sharded matrices": (LORA, PAIR | {"x.lora_A.weight": (0,), "x.lora_B.weight": (0,)}, None),
    "lora: vectors": (LORA, {"x.lora_A.weight": (4,), "x.lora_B.weight": (4,)}, None),
    "lora: a matrix and a kernel": (LORA, PAIR | {"x.lora_A.weight": (4, 6, 3)}, None),
    "lora: an embedding with a kernel": (
        LORA, {"x.lora_embedding_A": (4, 6, 1), "x.lora_embedding_B": (8, 4, 1)}, None,
    ),
    "lora: a convolution in groups": (LORA, {"x.lora_A.weight": (4, 6, 3), "x.lora_B.weight": (8, 2, 1)}, None),
    "lora: ranks that disagree": (LORA, PAIR | {"x.lora_B.weight": (8, 3)}, None),
    "lora: B with a wide kernel": (LORA, {"x.lora_A.weight": (4, 6, 3), "x.lora_B.weight": (8, 4, 3)}, None),
    "lora: another rank than configured": (LORA | {"r": 5}, PAIR, None),
    "lora: no rank": (LORA | {"r": None}, PAIR, None),
    "lora: rank zero": (LORA | {"r": 0}, PAIR, None),
    "lora: alpha is a word": (LORA | {"lora_alpha": "16"}, PAIR, None),
    "lora: alpha zero": (LORA | {"lora_alpha": 0}, PAIR, None),
    "lora: alpha beyond fp32": (LORA | {"lora_alpha": 1e31}, PAIR, None),
    "lora: rank_pattern is a list": (LORA | {"rank_pattern": ["x"]}, PAIR, None),
    "lora: rank_pattern gives half a rank": (LORA | {"rank_pattern": {"x": 0.5}}, PAIR, None),
    "lora: alpha_pattern gives nothing": (LORA | {"alpha_pattern": {"x": 0}}, PAIR, None),
    "lora: a pattern that is no expression": (LORA | {"rank_pattern": {"(": 4}}, PAIR, None),
    "lora: aLoRA": (LORA | {"alora_invocation_tokens": [1]}, PAIR, None),
    "lora: CorDA": (LORA | {"init_lora_weights": "corda"}, PAIR, None),
    "lora: OLoRA on a Conv1D": (LORA | {"init_lora_weights": "olora"}, PAIR, (6, 8)),
    "lora: enable_lora": (LORA | {"enable_lora": [True, False]}, PAIR, None),
    "lora: a bias of B without B": (LORA, {"x.lora_B.bias": (8,)}, None),
    "saved: a module in another one": (
        LORA | {"modules_to_save": ["head", "head.dense"]}, PAIR | {"head.dense.weight": (8, 6)}, None,
    ),
    "dora: magnitudes that nobody asked for": (LORA, PAIR | {MAGNITUDE: (8,)}, None),
    "dora: with lora_bias": (LORA | {"use_dora": True, "lora_bias": True}, PAIR | {MAGNITUDE: (8,)}, None),
    "dora: no magnitude": (LORA | {"use_dora": True}, PAIR, None),
    "dora: a magnitude alone": (
        LORA | {"use_dora": True}, PAIR | {MAGNITUDE: (8,), "y.lora_magnitude_vector": (8,)}, None,
    ),
    "dora: another rank than configured": (LORA | {"use_dora": True, "r": 5}, PAIR | {MAGNITUDE: (8,)}, None),
    "dora: another number of outputs": (LORA | {"use_dora": True}, PAIR | {MAGNITUDE: (7,)}, None),
    "adalora: no E": (ADALORA, without(TRIPLE, "x.lora_E"), None),
    "adalora: another rank": (ADALORA, TRIPLE | {"x.lora_E": (3, 1)}, None),
    "adalora: E is a row": (ADALORA, TRIPLE | {"x.lora_E": (1, 4)}, None),
    "adalora: not pruned as rank_pattern says": (
        ADALORA | {"rank_pattern": {"x.lora_E": [True, False, True, True]}}, TRIPLE, None,
    ),
    "adalora: a mask that is a number": (ADALORA | {"rank_pattern": {"x.lora_E": 3}}, TRIPLE, None),
    "adalora: A is a vector": (ADALORA, TRIPLE | {"x.lora_A": (4,)}, None),
    "adalora: no init_r": (ADALORA | {"init_r": None}, TRIPLE, None),
    "ia3: a vector of one dimension": (IA3, {"x.ia3_l": (8,)}, None),
    "ia3: a matrix": (IA3, {"x.ia3_l": (8, 2)}, None),
    "ia3: no list of feed-forward layers": (IA3 | {"feedforward_modules": None}, {"x.ia3_l": (8, 1)}, None),
    "ia3: no expression": (IA3 | {"feedforward_modules": "(up"}, {"x.ia3_l": (8, 1)}, None),
    "ia3: inputs of another layer": (IA3, {"up.ia3_l": (1, 8)}, (5, 7)),
    "ia3: half the inputs": (IA3, {"up.ia3_l": (1, 8)}, (5, 4)),
    "ia3: inputs that are no whole number of groups": (IA3, {"up.ia3_l": (1, 8, 1)}, (6, 3, 5)),
    "ia3: no inputs": (IA3, {"up.ia3_l": (1, 8, 1)}, (6, 0, 5)),
    "ia3: outputs that do not divide into the groups": (IA3, {"up.ia3_l": (1, 8, 1)}, (6, 2, 5)),
    "loha: a part is missing": (LOHA, without(PRODUCTS, "x.hada_w2_b"), None),
    "loha: one core": (LOHA, without(TUCKER, "x.hada_t2"), None),
    "loha: another rank": (LOHA | {"r": 3}, PRODUCTS, None),
    "loha: another rank in a pattern": (LOHA | {"rank_pattern": {"x": 3}}, PRODUCTS, None),
    "loha: another rank of the second": (LOHA, PRODUCTS | {"x.hada_w2_a": (8, 5)}, None),
    "loha: another rank of the right": (LOHA, PRODUCTS | {"x.hada_w2_b": (5, 6)}, None),
    "loha: products of two shapes": (LOHA, PRODUCTS | {"x.hada_w2_b": (4, 7)}, None),
    "loha: a part that is a kernel": (LOHA, PRODUCTS | {"x.hada_w1_a": (8, 4, 1)}, None),
    "loha: a core of another rank": (LOHA, TUCKER | {"x.hada_t1": (4, 3, 3)}, None),
    "loha: a core that is a matrix": (LOHA, TUCKER | {"x.hada_t1": (4, 4)}, None),
    "loha: with a core, another rank on the left": (LOHA, TUCKER | {"x.hada_w1_a": (5, 8)}, None),
    "loha: alpha is missing": (LOHA | {"alpha": None}, PRODUCTS, None),
    "lokr: the second is missing": (LOKR, {"x.lokr_w1": (2, 3)}, None),
    "lokr: another rank of the first": (
        LOKR, {"x.lokr_w1_a": (2, 3), "x.lokr_w1_b": (4, 3), "x.lokr_w2": (4, 2)}, None,
    ),
    "lokr: another rank of the first, right": (
        LOKR, {"x.lokr_w1_a": (2, 4), "x.lokr_w1_b": (3, 3), "x.lokr_w2": (4, 2)}, None,
    ),
    "lokr: another rank of the second": (LOKR, KRONECKER | {"x.lokr_w2_a": (4, 3)}, None),
    "lokr: another rank of the second, right": (LOKR, KRONECKER | {"x.lokr_w2_b": (3, 2)}, None),
    "lokr: with a core, another rank on the left": (LOKR, CORE | {"x.lokr_w2_a": (3, 4)}, None),
    "lokr: the first is a kernel": (LOKR, KRONECKER | {"x.lokr_w1": (2, 3, 1)}, None),
    "lokr: the second is a vector": (LOKR, {"x.lokr_w1": (2, 3), "x.lokr_w2": (4,)}, None),
    "lokr: a core of another rank": (LOKR, CORE | {"x.lokr_t2": (4, 3, 3)}, None),
    "boft: no scale": (BOFT, without(BUTTERFLY, "x.boft_s"), None),
    "boft: no rotation": (BOFT, without(BUTTERFLY, "x.boft_R"), None),
    "boft: no blocks": (BOFT, BUTTERFLY | {"x.boft_R": (1, 0, 3, 3)}, None),
    "boft: blocks that are not square": (BOFT, BUTTERFLY | {"x.boft_R": (1, 2, 3, 4)}, None),
    "boft: no dimension of factors": (BOFT, BUTTERFLY | {"x.boft_R": (2, 3, 3)}, None),
    "boft: a scale that is a matrix": (BOFT, BUTTERFLY | {"x.boft_s": (4, 2)}, None),
    "boft: a scale that is a vector": (BOFT, BUTTERFLY | {"x.boft_s": (8,)}, None),
    "boft: more factors than configured": (BOFT, BUTTERFLY | {"x.boft_R": (2, 2, 4, 4)}, None),
    "boft: blocks of an odd size": (
        BOFT | {"boft_n_butterfly_factor": 2}, BUTTERFLY | {"x.boft_R": (2, 2, 3, 3)}, None,
    ),
    "boft: too few blocks": (
        BOFT | {"boft_n_butterfly_factor": 3}, BUTTERFLY | {"x.boft_R": (3, 2, 4, 4)}, None,
    ),
    "boft: no number of factors": (BOFT | {"boft_n_butterfly_factor": None}, BUTTERFLY, None),
}  # fmt: skip
WEIGHTED = {"dora": (LORA | {"use_dora": True}, PAIR | {MAGNITUDE: (8,)}), "ia3": (IA3, {"x.ia3_l": (8, 1)})}
WEIGHTED |= {"boft": (BOFT, BUTTERFLY), "pissa": (LORA | {"init_lora_weights": "pissa"}, PAIR)}
CASES |= rare.CASES | more.CASES
WEIGHTED |= rare.WEIGHTED | more.WEIGHTED


def refusal(folder: Path, config: dict[str, Any], shapes: Shapes, weight: Any = None, factor: float = 1.0) -> str:
    """The whole message, with the adapter's folder called ADAPTER."""
    values = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(AdapterError) as caught:
        for update in updates_of(folder, values, config, factor=factor):
            if weight is not None and update.target.endswith(".weight"):
                update.load(weight)
    return str(caught.value).replace(str(folder), "ADAPTER")


def all_refusals(folder: Path) -> str:
    told = {name: refusal(folder / str(i), *case) for i, (name, case) in enumerate(CASES.items())}
    told |= {f"{n}: a factor": refusal(folder / n, *case, factor=0.5) for n, case in WEIGHTED.items()}
    return "".join(f"## {name}\n{text}\n\n" for name, text in told.items())


def test_refusals_have_golden_words(tmp_path: Path) -> None:
    assert all_refusals(tmp_path) == GOLDEN.read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(all_refusals(Path(scratch)))
