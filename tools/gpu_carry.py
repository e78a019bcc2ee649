"""The GPU suite on a machine without a network, to which only small folders travel: packed here, unpacked there.

    python tools/gpu_carry.py prepare             # here, on a CPU: .gpu/part-00 and so on, and the calls to make
    python3 tools/gpu_carry.py keep .gpu/part-00  # there, once for each part; the last one unpacks all of them

`prepare` packs the wheels that the other machine lacks (--package names others) and the graphs that it cannot
export in time: Optimum's, which needs an environment of its own, and a UNet's. Both are without weights, which come
from a seed there. `keep` needs Python's standard library and pip.
"""

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 2**20
FOLDER = Path(".gpu")  # has to be ignored by git
# pip takes a tag for the exact version that a wheel names.
TAGS = [f"manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
PACKAGES = (
    "onnxruntime-gpu", "onnxruntime-genai-cuda", "transformers", "peft", "blake3", "msgspec", "optimum",
    "zstandard",
)  # fmt: skip
GRAPHS = ("unet-graph", "optimum-graph")  # as the suite calls them in its work
PRECISION, PROVIDER, SHAPE = "fp16", "cuda", "135M"
SITE, STORE = Path("/tmp/site"), Path("/tmp/gpu-carried")
WORK, RESULTS = Path("/tmp/gpu-suite"), Path("/tmp/gpu-results")
MANIFEST, PART = "manifest.json", "data"
FIRST, LATER = 420, 560  # seconds of a call for steps: of the first, which also unpacks, and of those behind it


# --- here ----------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if subprocess.run(["git", "check-ignore", "-q", folder / "x"], check=False).returncode:
        sys.exit(f"{folder} is not ignored by git, and all of it would travel with each call; first:\n"
                 f"  echo /{folder}/ >> .git/info/exclude")  # fmt: skip
    wheels, graphs = folder / "wheels", folder / "graphs"
    make_graphs(graphs, options.work, options.small)
    download(options.package or [f"{n}=={importlib.metadata.version(n)}" for n in PACKAGES], wheels, options.python)
    packed = folder / "packed.tar"
    with tarfile.open(packed, "w") as file:
        for path in sorted(wheels.glob("*.whl")):
            file.add(path, f"wheels/{path.name}")
        for name in GRAPHS:
            file.add(graphs / name, f"graphs/{name}")
    parts = cut(packed, folder, int(options.limit_mib * MIB))
    for path in sorted([*wheels.glob("*.whl"), *graphs.glob("*/model.onnx")]):
        print(f"{path.stat().st_size / MIB:8.1f} MiB  {path.relative_to(folder)}")
    print(*calls(parts), sep="\n")


def make_graphs(folder: Path, work: Path, small: bool) -> None:
    """Optimum's graph of the demo's shape, and a UNet's, unless they are there."""
    flags = ["--small"] if small else []
    shape = "tiny" if small else SHAPE
    model = work / shape / "bf16"
    commands = {
        "unet-graph": ["gpu_inputs.py", "unet", folder / "unet-graph", PRECISION, PROVIDER, *flags],
        "optimum-graph": ["gpu_inputs.py", "optimum", model, folder / "optimum-graph", PRECISION],
    }
    subprocess.run([sys.executable, HERE / "random_models.py", work, shape, "bf16", "lora"], check=True)
    for name, (program, *words) in commands.items():
        if not (folder / name).exists():
            print(f"{name} …", flush=True)
            subprocess.run([sys.executable, HERE / program, *words], check=True)


def download(packages: list[str], folder: Path, python: str) -> None:
    """Wheels for the other machine's Python, without what they need."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [word for tag in [*TAGS, "any"] for word in ("--platform", tag)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    how = ["--implementation", "cp", "--python-version", python, *platforms, "-d", folder]
    subprocess.run([*pip, *how, *packages], check=True)


def cut(packed: Path, folder: Path, limit: int) -> list[Path]:
    """Parts of at most `limit` bytes; each knows the sha256 of all."""
    for old in folder.glob("part-*"):
        shutil.rmtree(old)
    size = packed.stat().st_size
    count = -(-size // limit)
    share, sums = -(-size // count), {}
    with packed.open("rb") as file:
        for i in range(count):
            part = folder / f"part-{i:02d}"
            part.mkdir()
            data = file.read(share)
            (part / PART).write_bytes(data)
            sums[part.name] = hashlib.sha256(data).hexdigest()
    parts = [folder / name for name in sums]
    for part in parts:
        (part / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    return parts


def calls(parts: list[Path]) -> list[str]:
    """What to run on the other machine, call by call."""
    keep = "python3 tools/gpu_carry.py keep"
    suite = f"PYTHONPATH=$PWD python3 tools/gpu_suite.py --out {RESULTS} --work {WORK}"
    back = "--archive $OUT/results.tar.xz"
    told = ["", f"{len(parts)} parts; the calls, one right behind the other:"]
    for i, part in enumerate(parts):
        size = (part / PART).stat().st_size / MIB
        then = f" && {suite} --budget {FIRST} {back}" if i == len(parts) - 1 else ""
        told += [f"{i + 1}. carry {part} ({size:.1f} MiB): {keep} {part}{then}"]
    more = len(parts) + 1
    told += [
        f"{more}. and again, until nothing is left out: {suite} --budget {LATER} {back}",
        f"On a new machine, all over: call {len(parts)} then also carries the last results.tar.xz, in "
        f"{FOLDER}/earlier, and has --earlier {FOLDER}/earlier/results.tar.xz.",
    ]
    return told


# --- there -----------------------------------------------------------------------------------------------------


def keep(options: argparse.Namespace) -> None:
    """Keep a part; when all are here, check, join, unpack and install them."""
    part: Path = options.part
    sums = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
    data = (part / PART).read_bytes()
    if hashlib.sha256(data).hexdigest() != sums.get(part.name):
        sys.exit(f"{part / PART} is not what its manifest says: prepare again")
    store: Path = options.store
    store.mkdir(parents=True, exist_ok=True)
    (store / part.name).write_bytes(data)
    absent = [n for n, s in sums.items() if not (store / n).is_file() or _sum(store / n) != s]
    print(f"{len(sums) - len(absent)} of {len(sums)} parts are here; missing: {' '.join(absent) or 'none'}")
    last = part.name == max(sums)
    if absent:
        sys.exit(1 if last else 0)
    with (store / "packed.tar").open("wb") as packed:
        for name in sums:
            packed.write((store / name).read_bytes())
    with tarfile.open(store / "packed.tar") as file:
        file.extractall(store, filter="data")
    for name in GRAPHS:
        place = options.work / f"real-{PROVIDER}" / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(store / "graphs" / name, place)
    if options.install:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        wheels = sorted((store / "wheels").glob("*.whl"))
        subprocess.run([*pip, "--no-cache-dir", "--target", options.site, *wheels], check=True)
        # Before what is installed there, and in every process: engines get no PYTHONPATH of ours.
        first = f"import sys; sys.path.insert(0, {str(options.site)!r})\n"
        Path(sysconfig.get_path("purelib"), "gpu-carried.pth").write_text(first, encoding="utf-8")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_subparsers(required=True, metavar="prepare|keep")
    here = asked.add_parser("prepare", help="here: pack wheels and graphs, and print the calls")
    here.add_argument("--folder", type=Path, default=FOLDER)
    here.add_argument("--work", type=Path, default=WORK / "models", help="for the model that Optimum exports")
    here.add_argument(
        "--package", action="append", metavar="NAME==VERSION", help="in place of the usual ones; repeat"
    )
    here.add_argument("--python", default="3.12", help="of the other machine (default: %(default)s)")
    here.add_argument("--limit-mib", type=float, default=48, help="of a part (default: %(default)s)")
    here.add_argument("--small", action="store_true", help="tiny graphs, to try it")
    here.set_defaults(run=prepare)
    there = asked.add_parser("keep", help="there: keep a part; the last one unpacks all")
    there.add_argument("part", type=Path)
    there.add_argument("--store", type=Path, default=STORE)
    there.add_argument("--work", type=Path, default=WORK)
    there.add_argument("--site", type=Path, default=SITE)
    there.add_argument("--no-install", dest="install", action="store_false")
    there.set_defaults(run=keep)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
