"""Which export to ship, and what made one lose the adapter: the first stage that did, and the option to change.

`test_precisions.py` has each cause on real merges and exports.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import AdapterSurvival, Check, ExportedPair
from lora_export.validation.effect.advice import Export, Merged, cause, precision_advice
from lora_export.validation.effect.effect import AnyEffect, Fidelity
from lora_export.validation.effect.precisions import JudgedExport, adapter_survival

AGAIN = "lora-export export --precision {precision}"


def exported(precision: str, nbytes: int, share: float, **more: Any) -> Export:
    return Export(precision, nbytes, share, share >= 0.9, **more)


def test_precision_advice_several_pass_names_the_smallest() -> None:
    some = [exported("fp16", 270, 1.0), exported("int4", 86, 0.75), exported("int8", 267, 0.99)]
    (advice,) = precision_advice(some, Merged(), 0.9, AGAIN)
    assert advice.startswith("Ship the int8 export")
    assert "int4 75.0%" in advice


@pytest.mark.parametrize(
    ("precision", "larger"), [("int4", "int8"), ("int8", "fp16"), ("fp16", "fp32"), ("nf4", "fp16")]
)
def test_precision_advice_none_passes_names_the_next_larger(precision: str, larger: str) -> None:
    (advice,) = precision_advice([exported(precision, 86, 0.4)], Merged(), 0.9, AGAIN)
    assert advice.startswith(f"Do not ship {precision}")
    assert advice.endswith(f"lora-export export --precision {larger}")


def test_precision_advice_without_effect_is_empty() -> None:
    assert precision_advice([], Merged(), 0.9, AGAIN) == ()


ROUNDED = Merged("bfloat16", 0.03, 0.033)


@pytest.mark.parametrize(
    ("export", "merged", "expected"),
    [
        (exported("fp32", 540, 0.03, by_weights=0.03), ROUNDED, "rounding"),
        # What comes first in the chain is named, though the next stage loses as much again.
        (exported("int4", 86, 0.1, by_weights=0.12), Merged("bfloat16", 0.6), "rounding"),
        # In one pass there is no merged folder to measure: an fp32 graph holds the merged weights.
        (exported("fp32", 540, 0.03, by_weights=0.03), Merged("bfloat16"), "rounding"),
        # No stage alone loses too much.
        (exported("int4", 86, 0.85, by_weights=0.91), Merged("bfloat16", 0.99), "weights"),
        (exported("fp32", 540, 0.88, by_weights=0.91), Merged("bfloat16", 0.91), "rounding"),
        (exported("int4", 86, 0.1, by_weights=0.12), Merged("bfloat16", 0.98), "weights"),
        (exported("int4", 86, 0.1), Merged(), "weights"),
        (exported("fp16", 270, 0.1, by_weights=1.0), Merged(None, 1.0), "arithmetic"),
        (exported("int8", 267, 0.1, by_weights=0.99, eight_bit_inputs=True), Merged(None, 1.0), "inputs"),
        (exported("int8", 67, 0.89, eight_bit_inputs=True), Merged(None, 1.0), "inputs"),
        (exported("fp32", 540, 0.1, by_weights=1.0, faults=("onnx_graph_kl_mean",)), Merged(None, 1.0), "export"),
        (exported("int4", 86, 0.1, by_weights=0.0, faults=("onnx_weight_errors",)), Merged(None, 1.0), "export"),
        (exported("fp32", 540, 0.1, by_weights=0.1), Merged("bfloat16", 0.1, faults=("tensor_errors",)), "merge"),
        (exported("fp32", 540, 0.4, by_weights=0.4), Merged(None, 0.4), "unknown"),
        (exported("fp32", 540, 0.4, by_weights=1.0), Merged(None, 1.0), "unknown"),
    ],
)
def test_cause_is_the_first_stage_that_loses_the_adapter(export: Export, merged: Merged, expected: str) -> None:
    assert cause(export, merged) == expected
    (advice,) = precision_advice([export], merged, 0.9, AGAIN)
    assert ("--dtype float32" in advice) == (expected == "rounding")
    assert ("--engine" in advice) == (expected == "export")
    assert ("--activations float" in advice) == (expected == "inputs")
    assert ("See which check" in advice) == (expected == "unknown")
    assert ("next larger precision" in advice) == (expected in ("weights", "arithmetic"))


def test_precision_advice_rounding_states_both_figures() -> None:
    (advice,) = precision_advice([exported("fp32", 540, 0.03, by_weights=0.03)], ROUNDED, 0.9, AGAIN)
    assert "rounded to bfloat16, which leaves 3.3% of its change to the weights" in advice
    assert "3.0% of its effect on the outputs" in advice


# --- how far an export is from the merged model -----------------------------------------------------------------


class Measured(AnyEffect):
    """An effect of which a share is kept, and a distance."""

    count = 1
    share = 0.96

    def __init__(self, far: Fidelity | None) -> None:
        super().__init__()
        self.far = far

    @property
    def fidelity(self) -> Fidelity | None:
        return self.far

    def survival(self, name: str) -> AdapterSurvival:
        return AdapterSurvival(name, self.share, None, None)


WORSE = Fidelity(lost=0.4, error=0.02, of_base=0.2, effect=0.35)


def kl_of(far: Fidelity | None, least: float = 0.9) -> tuple[Check | None, str]:
    pair = ExportedPair(Path("m"), Path("b"), "int4", 86)
    result = adapter_survival([JudgedExport(pair, (), Measured(far))], least, AGAIN, Merged())
    return next((c for c in result.checks if c.name == "onnx_kl"), None), result.advice[0]


@pytest.mark.parametrize(
    ("far", "limit"),
    [
        (replace(WORSE, effect=0.5), 0.5),
        (replace(WORSE, of_base=0.3), 0.45),
        (Fidelity(0.004, 0.001, 0.0001, 0.001), 0.00995),
        (WORSE, 0.35),
    ],
    ids=["less than the effect", "less than the base loses", "too little to matter", "more than any"],
)
def test_adapter_survival_kl_limit_is_the_largest_of_three(far: Fidelity, limit: float) -> None:
    check, advice = kl_of(far)
    assert check is not None and check.threshold == pytest.approx(limit, rel=1e-3)
    assert check.passed == (far is not WORSE) == advice.startswith("Ship the int4 export")
    assert f"± {far.error:.2g} between the texts" in check.note


def test_adapter_survival_kl_alone_fails_names_gptq_and_the_next_precision() -> None:
    _, advice = kl_of(WORSE)
    assert "farther from the merged model's than the precision explains (KL above 0.35)" in advice
    assert "The difference comes from weights in int4. Round them so that the outputs change least" in advice
    assert "--quantizer gptq" in advice and advice.endswith("--precision int8")


def test_adapter_survival_min_survival_0_accepts_any_kl() -> None:
    check, _ = kl_of(WORSE, least=0)
    assert check is not None and check.passed and check.threshold is None


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_adapter_survival_kl_that_is_no_number_fails(lost: float) -> None:
    for least in (0.9, 0):
        check, _ = kl_of(replace(WORSE, lost=lost), least)
        assert check is not None and not check.passed


def test_adapter_survival_of_outputs_that_are_no_tokens_has_no_kl() -> None:
    assert kl_of(None)[0] is None
