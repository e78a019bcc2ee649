"""Which rows can share a base, and what its preparation leaves."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_export.contracts import AdapterChoice, MergeOptions, QuantizationOptions, StoryOptions
from lora_export.contracts.fleet import FleetRow
from lora_export.merging import plan
from lora_export.workflows.fleet.base import why_alone
from lora_export.workflows.shared_base import why_not_shared
from tests.builders import edit_json, llama_config, lora, save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def row(base: Path, adapter: Path, options: StoryOptions | None = None) -> FleetRow:
    return FleetRow("a", "b", str(base), (str(adapter),), options or StoryOptions())


def test_why_alone_of_a_plain_adapter_is_empty(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    assert why_alone(row(base, adapter), base, [AdapterChoice(adapter)]) == ""


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"modules_to_save": ["lm_head"]}, "whole"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "vocabulary"),
        ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "tokens"),
    ],
)
def test_why_alone_of_an_adapter_with_another_graph_says_so(
    settings: dict[str, object], word: str, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora(**settings))
    assert word in why_alone(row(base, adapter), base, [AdapterChoice(adapter)])
    # The header says it, too, where the configuration does not.
    edit_json(adapter / "adapter_config.json", modules_to_save=None, trainable_token_indices=None)
    assert why_alone(row(base, adapter), base, [AdapterChoice(adapter)])


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (QuantizationOptions(algorithm="gptq"), "gptq"),
        (QuantizationOptions(keep=("touched",)), "touched"),
        (QuantizationOptions(keep=("*down_proj*", "auto")), "auto"),
        (QuantizationOptions(activations="static"), "static"),
    ],
)
def test_why_alone_of_options_that_read_the_adapter_names_them(
    how: QuantizationOptions, word: str, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    options = StoryOptions()
    options = replace(options, export=replace(options.export, quantization=how))
    assert word in why_alone(row(base, adapter, options), base, [AdapterChoice(adapter)])


def test_why_alone_of_a_search_or_an_arm_names_it(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    choices, plain = [AdapterChoice(adapter)], StoryOptions()
    small = replace(plain, export=replace(plain.export, precision="int4"), max_size=10**6)
    assert "--max-size" in why_alone(row(base, adapter, small), base, choices)
    assert "--arm" in why_alone(row(base, adapter, replace(plain, extra_arms=("pytorch",))), base, choices)
    combined = replace(plain, merge=replace(plain.merge, combine="linear"))
    assert "--combine" in why_alone(row(base, adapter, combined), base, choices)
    assert "2 adapters" in why_alone(row(base, adapter), base, choices * 2)


def test_why_alone_of_a_broken_adapter_is_no_error(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert "refused" in why_alone(row(base, tmp_path / "adapter"), base, [AdapterChoice(tmp_path / "adapter")])


def test_why_not_shared_of_a_plan_names_what_is_not_in_the_base(base: Path, tmp_path: Path) -> None:
    """Whatever the names in a header said: the plan of the merge has the last word."""
    tied = save_base(tmp_path / "tied", config=llama_config(tied=True))
    made = {
        "plain": (base, save_adapter(tmp_path / "plain", base, lora())),
        "rows": (tied, save_adapter(tmp_path / "rows", tied, lora(), rows=107, save_embeddings=True)),
        "head": (tied, save_adapter(tmp_path / "head", tied, lora(modules_to_save=["lm_head"]))),
    }
    reasons = {n: why_not_shared(plan(b, [AdapterChoice(a)], MergeOptions())) for n, (b, a) in made.items()}
    assert reasons["plain"] == ""
    assert "another shape" in reasons["rows"] and "not a tensor of the base" in reasons["head"]
