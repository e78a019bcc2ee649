"""Adapter kinds and layouts that another package brings through entry points."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export import merge
from lora_export.adapters.kind import Kind
from lora_export.adapters.registry import KINDS, KINDS_GROUP, LAYOUTS_GROUP, kinds
from lora_export.errors import AdapterError, InputError
from lora_export.plugins import Plugin
from tests.builders import save_base
from tests.plugged import installed

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
SHIFT = """
from dataclasses import dataclass, replace
from typing import Any

from lora_export.contracts import TargetUpdate

NAME, FORMULA = "Shift", "W + shift"


@dataclass(frozen=True)
class Shift:
    value: Any

    def apply(self, weight, rows):
        return weight + self.value[rows, None]


def read(file):
    for key in file.tensors:
        target, size = key.removesuffix(".shift") + ".weight", file.tensors[key].shape[0]
        yield TargetUpdate(target, "shift", (key,), ((size, None),), lambda shape, key=key: Shift(file.read(key)))


class Old:
    NAME = "old shifts"

    @staticmethod
    def claims(file):
        return "old_type" in file.config

    @staticmethod
    def as_peft(file):
        return replace(file, config={"peft_type": file.config["old_type"]})
"""
BOTH = {KINDS_GROUP: {"shift": "tiny_plugin"}, LAYOUTS_GROUP: {"old": ":Old"}}


def save_shift(folder: Path, config: Mapping[str, str]) -> torch.Tensor:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shift = torch.arange(48.0)
    name = f"base_model.model.{WEIGHT.removesuffix('.weight')}.shift"
    save_file({name: shift}, folder / "adapter_model.safetensors")
    return shift


@pytest.mark.parametrize("key", ["peft_type", "old_type"])
def test_plugged_kind_and_layout_merge_and_name_their_package(tmp_path: Path, key: str) -> None:
    base, adapter = save_base(tmp_path / "base"), tmp_path / "adapter"
    shift = save_shift(adapter, {key: "SHIFT"})
    with pytest.raises(AdapterError):
        merge(base, adapter, tmp_path / "merged")
    with installed(tmp_path / "site", SHIFT, BOTH):
        assert merge(base, adapter, tmp_path / "merged").tensors["updated"] == 1
    before, after = (load_file(tmp_path / n / "model.safetensors")[WEIGHT] for n in ("base", "merged"))
    torch.testing.assert_close(after, before + shift[:, None])
    certificate = json.loads((tmp_path / "merged" / "lora_export_certificate.json").read_text())
    assert certificate["adapters"][0]["kind_from"] == "tiny_plugin 1.2"


@pytest.mark.parametrize(
    ("peft_type", "code", "told"),
    [
        ("lora", "NAME, FORMULA, read = 'x', 'x', list", "claims the PEFT type LORA"),
        ("XLORA", "NAME, FORMULA, read = 'x', 'x', list", "claims the PEFT type XLORA"),
        ("shift", "NAME = 'x'", "lacks FORMULA, read"),
        ("shift", "import no_such_module", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_plugged_kind_that_cannot_be_used_is_refused_by_its_package(
    tmp_path: Path, peft_type: str, code: str, told: str
) -> None:
    point = {KINDS_GROUP: {peft_type: "tiny_plugin"}}
    with installed(tmp_path / "site", code, point), pytest.raises(InputError) as caught:
        kinds("SHIFT")
    assert caught.value.found.startswith(f"the plug-in {peft_type!r} of the package tiny_plugin 1.2 {told}")


def test_kinds_every_built_in_module_has_the_members_of_a_kind() -> None:
    for peft_type, names in KINDS.items():
        assert len(kinds(peft_type)) == len(names)
        for kind in kinds(peft_type):
            Plugin(peft_type, kind, "lora-export", "").check_members(Kind)
