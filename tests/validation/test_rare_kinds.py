"""Every rarer kind of PEFT is recomputed, tensor by tensor, and a fault in one weight is named."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.validation.comparing.tensors import compare_tensors
from lora_export.validation.reference.combined import reference_adapter
from lora_export.validation.reference.loading import load_merged
from lora_export.validation.reference.unmerged import load_unmerged
from tests.builders import edit_json, tensors
from tests.daily import daily
from tests.matrix.families import FAMILIES
from tests.matrix.rare import RARE
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


def combined(kind: str, tmp_path: Path, **options: Any) -> bool:
    """Whether a merge of an adapter of this kind with a LoRA passes when PEFT's own deltas are combined anew."""
    base, choices = FAMILIES["llama"].save(tmp_path / "base"), []
    for name in (kind, "lora"):
        train(base, FAMILIES["llama"], name, tmp_path / name)
        choices.append(AdapterChoice(tmp_path / name, 0.5))
    asked = MergeOptions(**options)
    merge(base, choices, tmp_path / "merged", asked)
    reference = reference_adapter(base, choices, asked, None, tmp_path / "reference")
    unmerged = load_unmerged(base, [reference], MergeOptions())
    merged, dtypes = load_merged(tmp_path / "merged", unmerged.cls)
    return all(e.worst <= 1 for e in compare_tensors(unmerged.model, merged, dtypes, 2))


@pytest.mark.parametrize("kind", daily(["miss", "vblora", "delora", "hra", "shira"], ["miss"]))
def test_reference_adapter_where_many_elements_are_equal_keeps_them_together(kind: str, tmp_path: Path) -> None:
    assert combined(kind, tmp_path, combine="ties", density=0.5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    daily(
        [
            ("road", {"combine": "linear"}, "changes a bias, too"),
            ("ia3", {"combine": "linear"}, "changes a bias, too"),
            ("fourierft", {"combine": "magnitude_prune", "density": 0.5}, "makes its delta in fp32"),
            ("c3a", {"combine": "ties", "density": 0.5}, "makes its delta in fp32"),
        ],
        [],
    ),
)
def test_reference_adapter_of_what_it_cannot_hold_is_refused(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=words):
        combined(kind, tmp_path, **options)


def test_load_unmerged_of_two_kinds_is_refused(tmp_path: Path) -> None:
    base = FAMILIES["llama"].save(tmp_path / "base")
    for kind in ("lora", "road"):
        train(base, FAMILIES["llama"], kind, tmp_path / kind)
    choices = [AdapterChoice(tmp_path / kind) for kind in ("lora", "road")]
    with pytest.raises(AdapterError, match="several kinds at once: LORA, ROAD"):
        load_unmerged(base, choices, MergeOptions())


@pytest.mark.parametrize("kind", daily(["miss", "miss bat"], ["miss"]))
def test_load_unmerged_of_bone_is_what_newer_peft_calls_miss(kind: str, tmp_path: Path) -> None:
    base = FAMILIES["llama"].save(tmp_path / "base")
    train(base, FAMILIES["llama"], kind, tmp_path / "miss")
    shutil.copytree(tmp_path / "miss", tmp_path / "bone")
    renamed = {n.replace("miss_block", "bone_block"): t for n, t in tensors(tmp_path / "miss").items()}
    save_file(renamed, tmp_path / "bone" / "adapter_model.safetensors")
    edit_json(tmp_path / "bone" / "adapter_config.json", peft_type="BONE")
    judged = Judged(base, tmp_path / "bone")
    assert not judged.faulty()
    merge(base, [AdapterChoice(tmp_path / "miss")], tmp_path / "with miss")
    found, expected = tensors(tmp_path / "merged"), tensors(tmp_path / "with miss")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
