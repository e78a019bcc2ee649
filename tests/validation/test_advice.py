"""Which export to ship, and what made one lose the adapter: the first stage that did, and the option to change.

`test_precisions.py` has each cause on real merges and exports.
"""

from typing import Any

import pytest

from lora_export.validation.effect.advice import Export, Merged, cause, precision_advice

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
