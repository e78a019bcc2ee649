"""Combined adapters are validated against PEFT, by formulas of validation's own; a wrong combination is noticed."""

from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import AdapterChoice, MergeOptions, Source, ValidationOptions
from lora_export.errors import AdapterError, InputError
from lora_export.merging import CERTIFICATE, merge
from lora_export.progress import Silent
from lora_export.workflows.validating import validate_folder
from tests.builders import lora
from tests.builders import save_adapter as save_random
from tests.validation.conftest import save_adapter

METHODS: list[dict[str, Any]] = [
    {"combine": "linear"},
    {"combine": "cat"},
    {"combine": "svd", "svd_rank": 3},
    {"combine": "ties", "density": 0.3},
    {"combine": "ties", "density": 0.5, "majority_sign": "frequency", "svd_rank": 4},
    {"combine": "magnitude_prune", "density": 0.4},
    {"combine": "dare_linear", "density": 0.5, "seed": 3},
    {"combine": "dare_ties", "density": 0.6, "seed": 4},
    {"combine": "linear", "combine_on": "factors"},
    {"combine": "ties", "combine_on": "factors", "density": 0.5},
    {"combine": "dare_linear", "combine_on": "factors", "density": 0.5},
]
WEIGHTS = (0.8, -0.6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> tuple[Path, list[Path]]:
    base, first = folders("float32")
    second = save_adapter(base, tmp_path_factory.mktemp("pair") / "second", seed=9)
    return base, [first, second]


def check(pair: Any, merged: Path, settings: dict[str, Any], **more: Any) -> Any:
    base, adapters = pair
    sources = [AdapterChoice(a, w) for a, w in zip(adapters, WEIGHTS, strict=True)]
    options = ValidationOptions(merge=MergeOptions(**settings), provider="cpu")
    return validate_folder(Source("base", base), sources, merged, (), (), options, Silent(), **more)


def merged_by(pair: Any, out: Path, settings: dict[str, Any]) -> Path:
    base, adapters = pair
    choices = [AdapterChoice(a, w) for a, w in zip(adapters, WEIGHTS, strict=True)]
    return merge(base, choices, out, MergeOptions(**settings)).output


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_validate_combination_passes(pair: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = check(pair, merged_by(pair, tmp_path / "out", settings), settings)
    assert result.passed, [c for c in result.checks if not c.passed]


@pytest.mark.parametrize(
    ("merged", "claimed"),
    [
        ({"combine": "ties", "density": 0.3}, {"combine": "ties", "density": 0.31}),
        ({"combine": "ties", "density": 0.3}, {"combine": "magnitude_prune", "density": 0.3}),
        ({"combine": "ties", "density": 0.5}, {"combine": "ties", "density": 0.5, "majority_sign": "frequency"}),
        ({"combine": "dare_linear", "density": 0.5}, {"combine": "dare_linear", "density": 0.5, "seed": 1}),
        ({"combine": "svd", "svd_rank": 3}, {"combine": "svd", "svd_rank": 4}),
        ({"combine": "linear"}, {"combine": "linear", "combine_on": "factors"}),
    ],
    ids=str,
)  # fmt: skip
def test_validate_other_combination_fails(pair: Any, tmp_path: Path, merged: Any, claimed: Any) -> None:
    folder = merged_by(pair, tmp_path / "out", merged)
    (folder / CERTIFICATE).unlink()  # as another tool leaves it: the certificate would contradict the claim
    result = check(pair, folder, claimed)
    assert not result.passed
    assert result.weight_errors


def test_validate_own_texts_measure_each_adapter(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4)
    alone = merge(base, [AdapterChoice(adapters[0])], tmp_path / "alone").output
    settings = {"combine": "linear"}
    both = check(pair, merged_by(pair, tmp_path / "both", settings), settings, own_texts=[text, text])
    first, second = (s.share for s in both.adapter_survival)
    assert first is not None and second is not None
    assert second < 0 < first  # the second adapter's weight is negative
    sources = [AdapterChoice(adapters[0])]
    options = ValidationOptions(provider="cpu")
    one = validate_folder(Source("base", base), sources, alone, (), (), options, Silent(), own_texts=[text])
    assert one.adapter_survival[0].share == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(InputError, match="1 × --own-text and 2 × -a"):
        check(pair, alone, settings, own_texts=[text])


def test_validate_combination_of_unsupported_layers_is_refused(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    whole = save_random(tmp_path / "whole", base, lora(target_modules=["q_proj"], modules_to_save=["v_proj"]))
    settings = {"combine": "linear"}
    merged = merge(
        base, [AdapterChoice(adapters[0]), AdapterChoice(adapters[1])], tmp_path / "out", MergeOptions(**settings)
    )
    with pytest.raises(AdapterError, match="a combination is validated on linear layers"):
        check((base, [adapters[0], whole]), merged.output, settings)
