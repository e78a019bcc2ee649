"""Every rarer kind of PEFT is recomputed, tensor by tensor, and a fault in one weight is named."""

from pathlib import Path

import pytest
import torch

from tests.daily import daily
from tests.matrix.families import FAMILIES
from tests.matrix.kinds import RARE
from tests.matrix.test_matrix import train
from tests.validation.test_recomputed import Judged

KINDS = [k for k in RARE if RARE[k](FAMILIES["llama"]) is not None]
# A layer that is replaced, a bank that layers share, an fp32 forward, outputs and biases that are mixed.
DAILY = ["ln tuning", "vblora short", "c3a", "road"]


@pytest.mark.parametrize("kind", daily(KINDS, DAILY))
def test_compare_tensors_of_a_rare_kind_names_the_weight_that_is_wrong(kind: str, tmp_path: Path) -> None:
    base = FAMILIES["llama"].save(tmp_path / "base")
    train(base, FAMILIES["llama"], kind, tmp_path / "adapter")
    judged = Judged(base, tmp_path / "adapter")
    assert not judged.faulty()
    ends = ["layers.1.input_layernorm.weight"] if kind == "ln tuning" else ["layers.1.mlp.down_proj.weight"]
    ends += ["layers.0.self_attn.q_proj.bias"] if kind.startswith("road") else []
    for end in ends:
        name, weight = judged.tensor(end)
        before = weight.clone()
        weight.flatten()[2] += 0.01 * float(weight.abs().max())
        assert name in judged.faulty() <= {name, name.replace(".bias", ".weight")}  # which is asked with its bias
        weight.copy_(before)


def test_compare_tensors_after_other_weights_of_the_bank_finds_them(tmp_path: Path) -> None:
    """PEFT reports the shared bank as missing under each layer's name; it must have been loaded all the same."""
    base = FAMILIES["llama"].save(tmp_path / "base")
    train(base, FAMILIES["llama"], "vblora", tmp_path / "adapter")
    judged = Judged(base, tmp_path / "adapter")
    with torch.no_grad():
        judged.unmerged.model.base_model.vblora_vector_bank["adapter0"] *= 1.01
    assert len(judged.faulty()) == 14
