"""Every element is recomputed: of each expert, of each tap of a kernel, of any rank; and buffers are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.merging import merge
from lora_export.validation.comparing.tensors import TensorError, compare_tensors
from lora_export.validation.reference.loading import load_merged
from lora_export.validation.reference.unmerged import load_unmerged
from tests.builders import save_adapter, save_base
from tests.matrix.families import FAMILIES, MOE
from tests.matrix.test_matrix import train
from tests.validation.models import MODELS

Change = Callable[[torch.Tensor], None]


class Judged:
    """An honest merge beside its unmerged model, whose weights a test may spoil in memory."""

    def __init__(self, base: Path, *adapters: Path) -> None:
        merged = base.parent / "merged"
        choices = [AdapterChoice(a) for a in adapters]
        merge(base, choices, merged)
        self.unmerged = load_unmerged(base, choices, MergeOptions())
        self.merged, self.dtypes = load_merged(merged, self.unmerged.cls)

    def faulty(self, seed: int = 0) -> set[str]:
        return {e.name for e in self.errors(seed) if not e.worst <= 1}

    def errors(self, seed: int = 0) -> list[TensorError]:
        return compare_tensors(self.unmerged.model, self.merged, self.dtypes, 2, seed=seed)

    def tensor(self, end: str) -> tuple[str, torch.Tensor]:
        named = [*self.merged.named_parameters(), *self.merged.named_buffers()]
        return next((n, t.data) for n, t in named if n.endswith(end))


def mixtral(root: Path, adapters: int = 1) -> Judged:
    """32 experts in each of two layers, with an adapter on all of them."""
    config = transformers.MixtralConfig(**MOE | {"num_local_experts": 32, "intermediate_size": 40})
    base = save_base(root / "base", transformers.MixtralForCausalLM, config, torch.bfloat16)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names, task_type="CAUSAL_LM")
    folders = [
        save_adapter(root / f"adapter{i}", base, lora, transformers.MixtralForCausalLM, seed=2 + i)
        for i in range(adapters)
    ]
    return Judged(base, *folders)


def scaled(experts: torch.Tensor) -> None:
    experts[3] *= 1.3


def exchanged(experts: torch.Tensor) -> None:
    experts[[1, 2]] = experts[[2, 1]]


def one_number(experts: torch.Tensor) -> None:
    experts[30, 5, 7] *= 1.05


@pytest.mark.parametrize("change", [scaled, exchanged, one_number])
def test_compare_tensors_any_expert_changed_is_named(tmp_path: Path, change: Change) -> None:
    judged = mixtral(tmp_path)
    assert not judged.faulty()
    name, experts = judged.tensor("layers.1.mlp.experts.down_proj")
    change(experts)
    assert judged.faulty() == {name}


def test_compare_tensors_two_adapters_on_experts_are_added(tmp_path: Path) -> None:
    judged = mixtral(tmp_path, adapters=2)
    assert not judged.faulty()
    name, experts = judged.tensor("layers.0.mlp.experts.gate_up_proj")
    one_number(experts)
    assert judged.faulty() == {name}


def test_compare_tensors_experts_in_small_blocks_give_the_same_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = mixtral(tmp_path)
    together = {e.name: e.worst for e in judged.errors()}
    monkeypatch.setattr("lora_export.validation.reference.whole.PARAMETER_BLOCK", 5 * 48 * 40)
    # Not to the last place: the bound looks at the largest change of a block.
    apart = {e.name: e.worst for e in judged.errors()}
    assert apart.keys() == together.keys()
    assert all(apart[n] == pytest.approx(together[n], rel=1e-2) for n in apart)


@pytest.mark.parametrize("kind", ["lora convolution", "dora convolution"])
def test_compare_tensors_one_tap_of_a_convolution_is_named(tmp_path: Path, kind: str) -> None:
    """By less than random combinations of a whole filter notice."""
    family = FAMILIES["resnet"]
    base = family.save(tmp_path / "base")
    train(base, family, kind, tmp_path / "adapter")
    judged = Judged(base, tmp_path / "adapter")
    assert not judged.faulty()
    name, weight = judged.tensor("layer.1.convolution.weight")
    assert weight.shape[2:] == (3, 3)
    weight[3, 2, 1, 2] += 6e-7
    assert judged.faulty() == {name}


def test_compare_tensors_a_high_rank_is_recomputed_whole(tmp_path: Path) -> None:
    """A rank above an eighth of the weight's size made it too dear, and one element hid among the sampled."""
    tiny = MODELS["gpt2"]
    base = tiny.save(tmp_path / "base", torch.float32)
    judged = Judged(base, tiny.train(base, tmp_path / "adapter", r=40, lora_alpha=50))
    assert not judged.faulty()
    name, weight = judged.tensor("h.1.attn.c_attn.weight")
    weight[17, 23] += 6e-7
    assert judged.faulty() == {name}


def test_compare_tensors_a_running_variance_is_named(tmp_path: Path) -> None:
    tiny = MODELS["resnet"]
    base = tiny.save(tmp_path / "base", torch.float32)
    judged = Judged(base, tiny.train(base, tmp_path / "adapter"))
    assert not judged.faulty()
    name, buffer = judged.tensor("running_var")
    buffer *= 1.02
    assert judged.faulty() == {name}
    buffer /= 1.02


def test_compare_tensors_a_count_in_a_buffer_is_named(tmp_path: Path) -> None:
    tiny = MODELS["resnet"]
    base = tiny.save(tmp_path / "base", torch.float32)
    judged = Judged(base, tiny.train(base, tmp_path / "adapter"))
    name, buffer = judged.tensor("num_batches_tracked")
    buffer += 1
    assert judged.faulty() == {name}


def test_compare_tensors_samples_are_other_ones_with_another_seed(tmp_path: Path) -> None:
    """Of what is sampled (OFT multiplies by more than low ranks) the columns follow from the seed."""
    family = FAMILIES["llama"]
    base = family.save(tmp_path / "base")
    train(base, family, "oft", tmp_path / "adapter")
    judged = Judged(base, tmp_path / "adapter")
    worst: list[Any] = [{e.name: e.worst for e in judged.errors(seed)} for seed in (1, 1, 2)]
    assert worst[0] == worst[1] != worst[2]
