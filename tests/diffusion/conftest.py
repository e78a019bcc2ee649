"""Tiny pipelines for the tests of diffusion: made once, in a process of its own, for all workers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

_MAKE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from tests.diffusion.tiny import save
for kind in ("sd15", "sdxl", "sd3", "flux"):
    save(kind, Path(sys.argv[1]) / kind)
"""
Bases = Callable[..., Path]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """bases("sdxl", torch.bfloat16) is the folder of a tiny pipeline, shared: read only.

    Importing diffusers takes seconds, which one process does for all workers.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "tiny pipelines"
    root.mkdir(exist_ok=True)

    def base(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        with FileLock(root / "lock"):
            if not (root / "made").exists():
                done = subprocess.run(
                    [sys.executable, "-c", _MAKE, str(root)],
                    cwd=Path(__file__).parents[2],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, done.stderr
                (root / "made").touch()
            folder = root / (kind if dtype == torch.float32 else f"{kind}-{str(dtype)[6:]}")
            if not folder.exists():
                _cast(root / kind, folder, dtype)
        return folder

    return base


def _cast(source: Path, target: Path, dtype: torch.dtype) -> None:
    """The same pipeline in another type, with the names that diffusers gives."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                tensors = {n: opened.get_tensor(n).to(dtype) for n in opened.keys()}  # noqa: SIM118
                save_file(tensors, copied, metadata=opened.metadata())
        elif path.name == "config.json" and "dtype" in (config := json.loads(path.read_text())):
            copied.write_text(json.dumps({**config, "dtype": str(dtype)[6:]}))
        else:
            copied.write_bytes(path.read_bytes())
