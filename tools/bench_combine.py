"""Memory and time of a merge of three combined adapters, by method.

    python tools/bench_combine.py --size 1.1B

A random base in bf16 and three LoRAs on all linear layers; each method is a whole process, beside a merge of one of
them. Peak memory is the largest resident set, looked at every 20 ms.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_memory import peak_of
from processes import HERE, LORA_EXPORT, Command, circumstances, remove, save

METHODS: dict[str, list[str]] = {
    "in turn": [],
    "linear": ["--combine", "linear"],
    "svd": ["--combine", "svd", "--svd-rank", "16"],
    "ties": ["--combine", "ties", "--density", "0.2"],
    "dare_linear": ["--combine", "dare_linear", "--density", "0.3"],
    "dare_ties": ["--combine", "dare_ties", "--density", "0.3"],
    "magnitude_prune": ["--combine", "magnitude_prune", "--density", "0.2"],
}


def rolled(adapter: Path, out: Path, by: int) -> Path:
    """The same adapter on other inputs, so that it has nothing to do with the first."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(adapter, out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    save_file({n: t.roll(by, 1) if "lora_A" in n else t for n, t in tensors.items()}, file, {"format": "pt"})
    return out


def main() -> None:
    options = parse()
    models: Command = [options.work, options.size, "bf16", "lora"]
    subprocess.run([sys.executable, HERE / "random_models.py", *models], check=True)
    home = options.work / options.size
    base, first = home / "bf16", home / "lora"
    adapters = [first, *(rolled(first, home / f"lora-{i}", 100 * i) for i in (1, 2))]
    chosen = [word for a, w in zip(adapters, (0.5, 0.4, 0.3), strict=True) for word in ("-a", f"{a}:{w}")]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-combine-", dir=options.work) as scratch:
        commands: dict[str, Command] = {"one adapter": ["-a", first]}
        commands |= {name: [*chosen, *METHODS[name]] for name in options.method}
        for name, words in commands.items():
            out = Path(scratch, "merged")
            rows[name] = peak_of([LORA_EXPORT, "merge", "-b", base, *words, "-o", out, "-q"])
            remove(out)
            print(f"{name}: {rows[name]['seconds']:.1f} s, {rows[name]['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    save(options.save, f"combine-{options.size}", circumstances(options.work, options.work) | {"methods": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1B")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    work = Path(tempfile.gettempdir(), "lora-export-bench")
    parser.add_argument("--work", type=Path, default=work, help="folder for the models (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
