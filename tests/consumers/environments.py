"""Runtimes that are no part of this project's environment, installed once into .cache/consumers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("LORA_EXPORT_CACHE", Path(__file__).parents[2] / ".cache")) / "consumers"
OPTIMUM = ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.32.0")
DIFFUSION = (*OPTIMUM, "diffusers==0.39.0", "sentencepiece", "protobuf")
SENTENCES = (*OPTIMUM, "sentence-transformers==5.7.0", "fastembed==0.9.1")
# transformers.js names the exact onnxruntime-web that it needs; onnxruntime-node has its CPU libraries inside.
TRANSFORMERS_JS = "@huggingface/transformers@4.3.0"
MODULES = (TRANSFORMERS_JS, "onnxruntime-node@1.30.0")


def optimum_python() -> Path:
    """The interpreter of an environment with optimum-onnx 0.1.0 and transformers 4.57."""
    return installed("optimum", OPTIMUM)


def diffusion_python() -> Path:
    """The interpreter of an environment with optimum-onnx 0.1.0, transformers 4.57 and diffusers 0.39."""
    return installed("optimum-diffusion", DIFFUSION)


def sentence_python() -> Path:
    """The interpreter of an environment with sentence-transformers, its ONNX backend, and fastembed."""
    return installed("sentence-transformers", SENTENCES)


def installed(name: str, packages: Sequence[str], without: Sequence[str] = ()) -> Path:
    """The interpreter of an environment of its own. without: what pip brings along and nothing here runs."""
    place = CACHE / name
    ready, wanted = place / ".ready", "\n".join([*packages, *(f"without {w}" for w in without)])
    if not ready.is_file() or ready.read_text() != wanted:
        pip = [place / "bin" / "python", "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        subprocess.run([*pip, "install", "--quiet", *packages], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *without], check=True)
        ready.write_text(wanted)
    return place / "bin" / "python"


def version(interpreter: Path, package: str) -> str:
    """The version of a package in an environment."""
    asked = f"import importlib.metadata as m, json; print(json.dumps(m.version({package!r})))"
    return str(python(interpreter, asked))


def node_folder() -> Path:
    """A folder with MODULES in its node_modules, installed without any install script."""
    place = CACHE / "js"
    ready, wanted = place / ".ready", "\n".join(MODULES)
    if not ready.is_file() or ready.read_text() != wanted:
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--ignore-scripts", "--prefix", str(place), *MODULES]
        subprocess.run(command, check=True, capture_output=True)
        ready.write_text(wanted)
    return place


def module_version(name: str) -> str:
    """The version of a module of npm."""
    told = json.loads((node_folder() / "node_modules" / name / "package.json").read_text())
    return str(told["version"])


def python(interpreter: Path, code: str) -> Any:
    """The last line that a program prints, as JSON."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [interpreter, "-"], input=code, capture_output=True, text=True, check=False, env=environment,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def node(code: str) -> Any:
    """The last line that a module prints on Node, as JSON."""
    done = subprocess.run(
        ["node", "--input-type=module", "-"], input=code, capture_output=True, text=True, check=False,
        cwd=node_folder(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
