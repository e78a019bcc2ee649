"""Quantization formats that another package brings through entry points."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export import merge
from lora_export.allowed import check_model_folder
from lora_export.errors import CheckpointError, InputError
from lora_export.quantization.registry import FORMATS, GROUP, formats, method_here
from lora_export.workflows.inspection import inspect_folder
from tests.builders import edit_json, save_base
from tests.plugged import installed
from tests.test_rooms import PACKAGE

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
HALVES = '''"""Weights that are stored as twice their value, in int8."""

from dataclasses import dataclass
from typing import Any

from lora_export.quantization.stored import QuantizedWeight

TENSORS = "tensors such as …q_proj.doubled"


@dataclass(frozen=True)
class Rows:
    value: Any

    def rows(self, start, stop):
        return self.value[start:stop] / 2


@dataclass(frozen=True)
class Halves(QuantizedWeight):
    def load(self, source):
        return Rows(source.read(self.parts[0]).float())


def find(source, config, dtype):
    names = [n for n in source.tensors if n.endswith(".doubled")]
    return [Halves(n.replace("doubled", "weight"), (n,), source.tensors[n].shape, "F32") for n in names]


def is_here(source):
    return any(n.endswith(".doubled") for n in source.tensors)
'''


def save_halves(folder: Path, settings: Mapping[str, Any] | None) -> torch.Tensor:
    """The stored numbers of one weight of a base that is otherwise unquantized."""
    state = load_file(save_base(folder) / "model.safetensors")
    doubled = torch.randint(-100, 100, state.pop(WEIGHT).shape, dtype=torch.int8)
    save_file(
        state | {WEIGHT.replace("weight", "doubled"): doubled}, folder / "model.safetensors", {"format": "pt"}
    )
    if settings is not None:
        edit_json(folder / "config.json", quantization_config=dict(settings))
    return doubled


@pytest.mark.parametrize("settings", [{"quant_method": "halves"}, None])
def test_plugged_format_is_read(tmp_path: Path, settings: dict[str, str] | None) -> None:
    base = tmp_path / "base"
    doubled = save_halves(base, settings)
    with pytest.raises(CheckpointError):
        merge(base, [], tmp_path / "merged")
    with installed(tmp_path / "site", HALVES, {GROUP: {"halves": "tiny_plugin"}}):
        assert merge(base, [], tmp_path / "merged").tensors["dequantized"] == 1
        check_model_folder(base)
        assert inspect_folder(base)["quantization"] == "halves"
    torch.testing.assert_close(load_file(tmp_path / "merged" / "model.safetensors")[WEIGHT], doubled / 2)


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("gptq", HALVES, "claims a quant_method that lora-export itself reads"),
        ("halves", "TENSORS = 'x'", "lacks find"),
    ],
)
def test_plugged_format_unusable_is_refused(tmp_path: Path, name: str, code: str, told: str) -> None:
    with installed(tmp_path / "site", code, {GROUP: {name: "tiny_plugin"}}), pytest.raises(InputError) as caught:
        formats()
    assert caught.value.found == f"the plug-in {name!r} of the package tiny_plugin 1.2 {told}"


def test_formats_claiming_same_tensors_are_refused(tmp_path: Path) -> None:
    class Source:
        def __init__(self, *names: str) -> None:
            self.tensors = dict.fromkeys(names)

    source: Any = Source("w.doubled")
    points = {GROUP: {"halves": "tiny_plugin", "doubles": "tiny_plugin"}}
    with installed(tmp_path / "site", HALVES, points):
        with pytest.raises(CheckpointError, match="a checkpoint of doubles or of halves"):
            method_here(source, {})
        both: Any = Source("w.doubled", "w.W_q")
        assert method_here(both, {}) == "hqq"


def test_unknown_quant_method_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "other"}}))
    with pytest.raises(CheckpointError) as refused:
        check_model_folder(tmp_path)
    assert refused.value.expected == ", ".join(sorted(FORMATS))


def test_format_is_one_file_and_one_line(tmp_path: Path) -> None:
    """In a copy of the package: a new file, and two lines of registry.py."""
    copy = tmp_path / "copy" / "lora_export"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "quantization" / "halves.py").write_text(HALVES)
    registry = copy / "quantization" / "registry.py"
    text = registry.read_text().replace("    gptq,\n", "    gptq,\n    halves,\n", 1)
    registry.write_text(text.replace('    "mlx": mlx,\n', '    "mlx": mlx,\n    "halves": halves,\n', 1))
    base, merged = tmp_path / "base", tmp_path / "merged"
    doubled = save_halves(base, {"quant_method": "halves"})
    command = [sys.executable, "-m", "lora_export", "merge", "-b", base, "-o", merged]
    environment = os.environ | {"PYTHONPATH": str(copy.parent)}
    assert subprocess.run(command, cwd=copy.parent, env=environment, check=False).returncode == 0
    torch.testing.assert_close(load_file(merged / "model.safetensors")[WEIGHT], doubled / 2)
