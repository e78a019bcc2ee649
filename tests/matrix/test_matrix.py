"""Every kind on every family: the merged model computes what PEFT's unmerged one computes, both in float64."""

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lora_export.contracts import AdapterChoice
from lora_export.merging import merge
from tests.builders import randomize
from tests.daily import daily
from tests.matrix.families import FAMILIES, Family
from tests.matrix.kinds import KINDS, SELDOM
from tests.matrix.refused import PEFT_REFUSES, WE_REFUSE

TOLERANCE = 1e-5
PISSA = 1e-4  # PEFT's own decomposition of the base is fp32
CELLS = [
    (kind, family)
    for kind, family in itertools.product(KINDS, FAMILIES)
    if KINDS[kind](FAMILIES[family]) is not None
]
RUNNING = [cell for cell in CELLS if cell not in PEFT_REFUSES and cell not in WE_REFUSE]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → its saved base, made when it is first asked for."""

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = FAMILIES[name].save(tmp_path_factory.mktemp("base") / "base")
            return self[name]

    return Bases()


@pytest.fixture(scope="session")
def untouched(bases: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Family → what its base answers."""

    class Untouched(dict[str, torch.Tensor]):
        def __missing__(self, name: str) -> torch.Tensor:
            self[name] = FAMILIES[name].answer(FAMILIES[name].load(bases[name]))
            return self[name]

    return Untouched()


def train(base: Path, family: Family, kind: str, folder: Path) -> None:
    """An adapter "trained" on `base`: everything that its configuration trains gets random values."""
    model = peft.get_peft_model(family.load(base), KINDS[kind](family))
    if kind == "adalora pruned":
        _prune(model)
    names = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    randomize(model, 2, names, 0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "ia3_l" in name or "boft_s" in name:
                parameter.copy_(parameter.abs() + 0.5)  # a scale near one, as training has it
    model.save_pretrained(folder, save_embedding_layers=False)


def _prune(model: Any) -> None:
    """Masks as AdaLoRA's training leaves them: some ranks, none at all, and all."""
    masks = itertools.cycle([[True, False] * 3, [False] * 6, [True] * 6, [False, False, True] * 2])
    layers = [n for n, m in model.base_model.model.named_modules() if "default" in getattr(m, "lora_E", {})]
    pattern = {f"{name}.lora_E": next(masks) for name in layers}
    model.peft_config["default"].rank_pattern = pattern
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")


# Every kind and every family every day: of kinds that many train a quarter of the pairs, of the others one.
DAILY = [
    c for c in RUNNING if c[0] not in SELDOM and (list(KINDS).index(c[0]) + list(FAMILIES).index(c[1])) % 4 == 0
]
for number, missing in enumerate(k for k in KINDS if k not in {d for d, _ in DAILY}):
    theirs = [c for c in RUNNING if c[0] == missing]
    DAILY += theirs[number % len(theirs) :][:1] if theirs else []
DAILY += [next(c for c in RUNNING if c[1] == f) for f in sorted({f for _, f in RUNNING} - {f for _, f in DAILY})]


@pytest.mark.parametrize(("kind", "name"), daily(RUNNING, DAILY), ids=[" on ".join(c) for c in RUNNING])
def test_matrix_merged_equals_unmerged(
    kind: str, name: str, bases: dict[str, Path], untouched: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    family, base, before = FAMILIES[name], bases[name], untouched[name]
    train(base, family, kind, tmp_path / "adapter")
    unmerged = peft.PeftModel.from_pretrained(family.load(base), str(tmp_path / "adapter")).eval()
    expected = family.answer(unmerged)
    result = merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    found = family.answer(family.load(tmp_path / "merged"))
    scale = float(expected.abs().max())
    tolerance = PISSA if kind == "lora pissa" else TOLERANCE
    assert float((found - expected).abs().max()) <= tolerance * scale
    # The adapter must matter, or the comparison shows nothing.
    assert expected.shape != before.shape or float((expected - before).abs().max()) > 1e-4 * scale
    assert result.adapter_tensors["used"] == result.adapter_tensors["total"] > 0


def test_matrix_runs_enough_cells() -> None:
    assert len(RUNNING) >= 250
    assert {kind for kind, _ in RUNNING} >= KINDS.keys() - {k for k, _ in PEFT_REFUSES | WE_REFUSE}
    assert {family for _, family in RUNNING} == {family for _, family in DAILY} == FAMILIES.keys()
    assert {kind for kind, _ in RUNNING} == {kind for kind, _ in DAILY}
    assert set(CELLS) >= PEFT_REFUSES.keys() | WE_REFUSE.keys()


# One cell of each reason every day.
REASONS = {reason: cell for cell, reason in PEFT_REFUSES.items()}


@pytest.mark.parametrize(
    ("kind", "name"), daily(PEFT_REFUSES, REASONS.values()), ids=[" on ".join(c) for c in PEFT_REFUSES]
)
def test_matrix_cells_that_peft_cannot_build_fail_in_peft(
    kind: str, name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """If one of these starts to work in PEFT, the cell belongs among those that run."""
    family = FAMILIES[name]
    with pytest.raises(Exception, match=PEFT_REFUSES[kind, name]):
        train(bases[name], family, kind, tmp_path / "adapter")
        family.answer(peft.PeftModel.from_pretrained(family.load(bases[name]), str(tmp_path / "adapter")))


@pytest.mark.parametrize(("kind", "name"), WE_REFUSE, ids=[" on ".join(c) for c in WE_REFUSE])
def test_matrix_unmergeable_cells_are_refused(kind: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    from lora_export.errors import LoraExportError

    train(bases[name], FAMILIES[name], kind, tmp_path / "adapter")
    with pytest.raises(LoraExportError, match=WE_REFUSE[kind, name]):
        merge(bases[name], [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
