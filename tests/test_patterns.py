"""Expressions of a configuration match what `re` matches, and cannot take for ever."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_export import patterns
from lora_export.adapters.config import PatternedRank, match_pattern, settings
from lora_export.contracts import AdapterChoice
from lora_export.errors import AdapterError
from lora_export.validation.reference.unmerged import attach_adapters
from tests.builders import edit_json, load, lora, save_adapter, save_base

EVIL = r"((\w|[a-z]|\.|[._])+)+(?<=!)"  # exponential for `re` and for `regex`
HONEST = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.\d{1,2}\.self_attn\.[qv]_proj",
    r"^(?!.*layers\.0\.).*(?:q_proj|up_proj)$",
    r".*(?<=self_attn\.)o_proj",
    r"(?:model.layers.1.mlp.(?:up|gate)_proj)",
    r".*\.(\w)_(?P<kind>proj)|.*\b[^.]+down_proj",
]  # fmt: skip
NAMES = [
    f"model.layers.{i}.{m}"
    for i in (0, 1, 11)
    for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp")
] + ["lm_head", "", "model.embed_tokens", "xmodel.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("expression", HONEST)
def test_fullmatch_equals_re(expression: str) -> None:
    theirs = [bool(re.fullmatch(expression, name)) for name in NAMES]
    assert [bool(patterns.fullmatch(expression, name)) for name in NAMES] == theirs and True in theirs


KEYS = st.sampled_from(["q_proj", "a.b", "a.", ".a", "layers.1", "b", "a|b", "a.*", "a+", "", "1.q_proj", "a-b"])
PARTS = st.lists(st.sampled_from(["a", "b", "ab", "a-b", "q_proj", "1", "layers", "aXb"]), max_size=4).map(".".join)


@given(key=KEYS, name=PARTS)
def test_ends_with_follows_peft(key: str, name: str) -> None:
    assert patterns.ends_with(key, name) == bool(re.match(rf"(.*\.)?({key})$", name))


@pytest.mark.parametrize(
    "expression",
    [
        "((a{999}){999}){999}",
        "(" * 3000 + ")" * 3000,
        "a{99999999999999999999}",
        "x" * 70_000,
        "(",
        "[[:alpha:]]",
        "a{e<=3}",
    ],
)
def test_pattern_too_large_or_ambiguous_is_refused(expression: str) -> None:
    started = time.process_time()
    with pytest.raises(AdapterError, match="regular expression"):
        patterns.fullmatch(expression, "a" * 900)
    assert time.process_time() - started < 1


def test_patterns_share_one_time_budget() -> None:
    """Each takes far less than its own limit; together they would take minutes."""
    started = time.process_time()
    with pytest.raises(AdapterError, match="too long") as refused, patterns.within(0.5, "here"):
        for i in range(2000):
            patterns.fullmatch(EVIL, f"{'a' * 12}{i}")
            match_pattern({f"{EVIL}{i % 7}": 1}, f"{'a' * 12}{i}", None)
    assert time.process_time() - started < 3 and refused.value.where == "here"


def test_patterns_too_many_are_refused_quickly(tmp_path: Path) -> None:
    """As keys of rank_pattern, where each is checked before any is matched; plain names are no matter."""
    started = time.process_time()
    keys = {f"{i}.[a-z]+(b|c{i})*": 2 for i in range(50_000)}
    with pytest.raises(AdapterError, match="one of too many"), patterns.within(0.5, "here"):
        settings({"r": 1, "rank_pattern": keys}, PatternedRank, tmp_path)
    assert time.process_time() - started < 3
    with patterns.within(0.5, "here"):
        plain = {f"layers.{i}.q": 2 for i in range(50_000)}
        assert settings({"r": 1, "rank_pattern": plain}, PatternedRank, tmp_path).rank("layers.0.q") == 2


# --- inside of PEFT ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("patterns")
    base = save_base(folder / "base")
    return base, save_adapter(folder / "adapter", base, lora(target_modules=["q_proj", "v_proj"]))


def attached(folders: tuple[Path, Path], tmp_path: Path, **changes: Any) -> Any:
    base, adapter = folders
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    return attach_adapters(load(base), [AdapterChoice(tmp_path / "adapter")])


FIELDS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": EVIL},
    "exclude_modules": {"exclude_modules": EVIL},
    "modules_to_save": {"modules_to_save": [EVIL]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": [EVIL]},
    "rank_pattern": {"rank_pattern": {EVIL: 3}},
    "alpha_pattern": {"alpha_pattern": {EVIL: 3}},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FIELDS)
def test_peft_pathological_pattern_is_stopped(
    name: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "PATIENCE", 0.1)
    started = time.process_time()
    with pytest.raises(AdapterError, match="takes too long"):
        attached(folders, tmp_path, **FIELDS[name])
    assert time.process_time() - started < 10
    assert peft.tuners.tuners_utils.re is re


@pytest.mark.parametrize(
    "changes",
    [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**8}}, {"layer_replication": [[0, 2]] * 6000}],
)
def test_peft_large_configuration_is_bounded(changes: dict[str, Any], folders: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no tensor has a dimension|too many layers"):
        attached(folders, tmp_path, **changes)


@pytest.mark.parametrize("expression", HONEST)
def test_peft_targets_are_unchanged(expression: str, folders: Any, tmp_path: Path) -> None:
    """With two adapters, too: the second finds the layers of the first among the names."""
    base, _ = folders
    config = lora(target_modules=expression, rank_pattern={r"\w+\.[qv]_proj": 2})
    model = load(base)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, config, adapter_name="adapter0")
    theirs.add_adapter("adapter1", config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    choices = [AdapterChoice(tmp_path / "adapter0"), AdapterChoice(tmp_path / "adapter1")]
    ours = attach_adapters(load(base), choices)
    wanted = {n: tuple(v.shape) for n, v in theirs.state_dict().items()}
    assert {n: tuple(v.shape) for n, v in ours.state_dict().items()} == wanted
