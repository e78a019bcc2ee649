"""A run of a tiny pipeline, by the command line: packaged, drawn by Optimum and by diffusers, and checked again."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import manifest
from lora_export.contracts import AdapterChoice, VerifyOptions
from lora_export.progress import Silent
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import hash_folder, write_sealed
from lora_export.workflows import delivered, verifying
from tests.consumers import environments as consumers
from tests.consumers.answers import cell
from tests.diffusion.files import Plan, make
from tests.end_to_end.conftest import ROOT, Run

pytestmark = pytest.mark.slow
_SAVE = (
    "import sys; from pathlib import Path; from tests.diffusion.tiny import save; save('sd15', Path(sys.argv[1]))"
)


@pytest.fixture(scope="module")
def told(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, style.safetensors, run, and a package for each runtime that draws."""
    root = tmp_path_factory.mktemp("pipeline")
    subprocess.run([sys.executable, "-c", _SAVE, root / "base"], cwd=ROOT, check=True, capture_output=True)
    make(root / "style.safetensors", root / "base", "sd15", "kohya", Plan(every=3))
    words = ["-b", root / "base", "-a", root / "style.safetensors", "-o", root / "run", "--max-time", "3s"]
    code, _, talk = run("merge-and-export", *words)
    assert code == 0, talk
    for target in ("optimum", "hf"):
        code, _, talk = run("package", root / "run", "--for", target, "-o", root / target)
        assert code == 0, talk
    return root


def verdict(folder: Path, runtime: Path | None) -> tuple[bool, str]:
    found = delivered.verify(folder, None, True, runtime, Silent())
    (one,) = [c for c in found.checks if c.name == "runs"]
    return found.verified, one.note


def psnr(note: str) -> float:
    if "pixel by pixel" in note:
        return np.inf
    told = re.search(r"picture, ([-.\d]+) dB from", note)
    assert told, note
    return float(told[1])


@pytest.mark.parametrize(
    ("consumer", "package", "command"),
    [
        ("Optimum", "optimum", 'ORTStableDiffusionPipeline.from_pretrained("PACKAGE")'),
        ("diffusers", "hf", 'StableDiffusionPipeline.from_pretrained("PACKAGE")'),
    ],
)
def test_consumer_draws_picture_of_package(consumer: str, package: str, command: str, told: Path) -> None:
    other = consumers.diffusion_python() if package == "optimum" else None
    release = consumers.version(other or Path(sys.executable), "optimum-onnx" if other else "diffusers")
    with cell(consumer, release, package, "pipeline", "tiny Stable Diffusion", command) as kept:
        verified, note = verdict(told / package, other)
        assert verified and psnr(note) >= 60, note
        kept.same(f"the validated picture, to {min(psnr(note), 100):.0f} dB or more")


def test_readme_of_package_draws_picture(told: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(told / "optimum", tmp_path / "package"))
    code = re.search(r"<<'END'\n(.*?)\nEND$", (folder / "README.md").read_text(), re.S | re.M)
    assert code
    done = subprocess.run(
        [consumers.diffusion_python(), "-"], input=code[1], cwd=folder, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said == "equal" or said >= 60
    assert (tmp_path / "picture.png").is_file()
    assert delivered.verify(folder, None, False, None, Silent()).verified


def _edited(path: Path, key: str, value: Any) -> None:
    document = json.loads(path.read_text())
    assert document[key] != value
    path.write_text(json.dumps(document | {key: value}))


def _scaled(path: Path, factor: float) -> None:
    """All weights of a model, in a file of fp32 numbers."""
    numbers = np.frombuffer(path.read_bytes(), np.float32)
    path.write_bytes((numbers * np.float32(factor)).tobytes())


@pytest.mark.parametrize("fault", ["scheduler", "text_encoder", "unet"])
def test_verify_refuses_package_that_draws_another_picture(fault: str, told: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(told / "optimum", tmp_path / "package"))
    if fault == "scheduler":
        _edited(folder / "scheduler" / "scheduler_config.json", "beta_end", 0.011)
    else:
        _scaled(folder / fault / "model.onnx_data", 1.01)
    document = json.loads((folder / "manifest.json").read_text())
    del document["digest"]
    files = {n: h for n, h in hash_folder(folder).items() if n != "manifest.json"}
    write_sealed(folder / "manifest.json", document | {"files": as_json(files)})
    verified, note = verdict(folder, consumers.diffusion_python())
    assert not verified and psnr(note) < 60, note


def test_verify_makes_graphs_of_run_again(told: Path) -> None:
    adapter = AdapterChoice(told / "style.safetensors")
    found = verifying.verify(told / "run", told / "base", [adapter], VerifyOptions(), Silent())
    assert found.verified, [c for c in found.checks if not c.passed]
    parts = ("unet", "text_encoder", "vae_encoder", "vae_decoder")
    names = {c.name for c in found.checks}
    assert names >= {f"{part}: onnx_weights" for part in parts} | {"unet: arithmetic", "onnx_record"}


@pytest.mark.parametrize("fault", ["data", "scheduler", "record", "tokenizer"])
def test_verify_finds_changed_graph_of_run(fault: str, told: Path, tmp_path: Path) -> None:
    root = tmp_path / "all"
    for name in ("base", "run"):
        shutil.copytree(told / name, root / name)
    shutil.copy(told / "style.safetensors", root)
    copy, onnx = root / "run", root / "run" / "onnx"
    if fault == "data":
        raw = bytearray((onnx / "unet" / "model.onnx_data").read_bytes())
        raw[1000] ^= 1
        (onnx / "unet" / "model.onnx_data").write_bytes(raw)
    elif fault == "scheduler":
        _edited(onnx / "scheduler" / "scheduler_config.json", "beta_end", 0.011)
    elif fault == "tokenizer":
        (onnx / "tokenizer" / "more.txt").write_text("")
    else:
        document = json.loads((onnx / "export.json").read_text())
        document["components"]["unet"]["record_sha256"] = 64 * "0"
        (onnx / "export.json").write_text(json.dumps(document))
    sealed = manifest.read(copy)
    (copy / "manifest.json").unlink()
    write_sealed(copy / "manifest.json", as_json({**as_json(sealed), "files": as_json(hash_folder(copy))}))
    how, adapter = VerifyOptions(graph=False), AdapterChoice(root / "style.safetensors")
    found = verifying.verify(copy, root / "base", [adapter], how, Silent())
    wrong = {c.name for c in found.checks if not c.passed}
    at = {"data": "unet: onnx_weights", "record": "onnx_record"}
    assert wrong == {at.get(fault, "onnx_files")}, found
