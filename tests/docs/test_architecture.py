"""docs/architecture.md: an adapter kind is a file and a registration; names of engines and targets are theirs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file, save_file

from lora_export.choices import Precision
from lora_export.onnx_export.engines import engines
from lora_export.packages.targets import targets
from lora_export.registered import engine_names, target_names
from tests.builders import save_base
from tests.test_rooms import PACKAGE

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


LINE = 'KINDS: dict[str, tuple[str, ...]] = {\n    "SHIFT": ("shift",),'
SHIFT = '''"""W' = W + shift, a number for each row."""

from dataclasses import dataclass

import torch

from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

NAME, FORMULA = "Shift", "W + shift"


@dataclass(frozen=True)
class Shift:
    shift: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight + self.shift[rows, None]


def read(file: AdapterFile) -> list[TargetUpdate]:
    return [
        TargetUpdate(
            target=key.removesuffix(".shift") + ".weight",
            kind="shift",
            keys=(key,),
            shapes=((file.tensors[key].shape[0], None),),
            load=lambda shape, key=key: Shift(file.read(key)),
        )
        for key in file.tensors
    ]
'''


def test_add_adapter_kind_as_documented(tmp_path: Path) -> None:
    """In a copy of the package: a new file, and a line of registry.py."""
    copy = tmp_path / "copy" / "lora_export"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    registry = copy / "adapters" / "registry.py"
    (copy / "adapters" / "shift.py").write_text(SHIFT)
    registry.write_text(registry.read_text().replace("KINDS: dict[str, tuple[str, ...]] = {", LINE))
    changed = [
        p.relative_to(copy).as_posix()
        for p in copy.rglob("*.py")
        if not (original := PACKAGE / p.relative_to(copy)).exists() or original.read_bytes() != p.read_bytes()
    ]
    assert sorted(changed) == ["adapters/registry.py", "adapters/shift.py"]
    base, adapter, merged = save_base(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIFT"}))
    shift = torch.arange(48.0)
    save_file(
        {f"base_model.model.{WEIGHT.removesuffix('.weight')}.shift": shift}, adapter / "adapter_model.safetensors"
    )
    command = [sys.executable, "-m", "lora_export", "merge", "-b", base, "-a", adapter, "-o", merged]
    done = subprocess.run(command, cwd=copy.parent, env=os.environ | {"PYTHONPATH": str(copy.parent)}, check=False)
    assert done.returncode == 0
    before, after = (load_file(f / "model.safetensors")[WEIGHT] for f in (base, merged))
    torch.testing.assert_close(after, before + shift[:, None])


def test_registered_engines_and_targets_have_their_own_names() -> None:
    assert {name: e.name for name, e in engines().items()} == {n: n for n in engine_names()}
    assert {name: t.name for name, t in targets().items()} == {n: n for n in target_names()}
    assert set(get_args(Precision)) >= {"fp32", "fp16", "int4"}
