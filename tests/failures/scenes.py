"""Each command on tiny inputs, for tests that do harm to its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import AdapterChoice, ExportOptions, MergeOptions, PackageOptions
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight, share
from lora_export.progress import Silent
from lora_export.workflows.packaging import package
from tests.builders import lora, save_adapter, save_base
from tests.failures.planted import Scene
from tests.packages.conftest import make_run, save_decoder, save_lora
from tests.report.conftest import full_report, write

Stock = Callable[[str], Path]


def plain(folder: Path) -> None:
    """base, two adapters, and the first of them merged."""
    base = save_base(folder / "base", max_shard_size=100_000)
    for name, seed in (("a", 1), ("b", 2)):
        adapter = save_adapter(folder / name, base, lora(target_modules=["q_proj"]), seed=seed)
        (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
        (adapter / "README.md").unlink(missing_ok=True)
    (base / "notes.txt").write_text("a companion\n")
    (base / "modules.json").write_text("[]")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))


def only(make: Callable[[Path], None], *names: str) -> Callable[[Path], None]:
    """Of what `make` makes, the inputs of one command."""

    def made(folder: Path) -> None:
        make(folder)
        for path in folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path)

    return made


def merged(folder: Path) -> None:
    plain(folder)
    merge(folder / "base", [AdapterChoice(folder / "a")], folder / "merged", MergeOptions())


def reported(folder: Path) -> None:
    write(without_plots(), folder / "run" / "report")


def without_plots() -> dict[str, Any]:
    """A report whose pages take no seconds to draw."""
    report = full_report() | {"benchmark": None}
    report["merge"]["records"] = []
    return report


def decoder(folder: Path) -> None:
    """One with a tokenizer, two adapters, and the first of them merged."""
    base = save_decoder(folder / "base")
    for name in ("a", "b"):
        save_lora(base, folder / name, ["q_proj"] if name == "a" else ["v_proj"])
    merge(base, [AdapterChoice(folder / "a")], folder / "merged", MergeOptions())


def exported(folder: Path) -> None:
    """And an export of the base, one of the merged model, and one that shares the base's weights."""
    decoder(folder)
    base = folder / "base"
    export(base, folder / "base-onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    reweight(folder / "base-onnx", folder / "merged", folder / "onnx", progress=Silent())
    share(folder / "base-onnx", folder / "merged", folder / "shared", "one", progress=Silent())


def ran(folder: Path) -> None:
    base = save_decoder(folder / "base")
    adapter = save_lora(base, folder / "a", ["q_proj"])
    make_run(base, adapter, folder / "run")


def packaged(folder: Path) -> None:
    ran(folder)
    package(folder / "run", "hf", folder / "package", PackageOptions(), Silent())


QUICK = ["--prompt-length", 8, "--max-time", "2s", "--provider", "cpu"]

Words = Callable[[Path], list[object]]
MARGIN = ("--margin", "90%", "--prompt-length", 8, "--max-time", "2s", "--provider", "cpu")


def merging(w: Path) -> list[object]:
    return ["-b", w / "base", "-a", w / "a"]


def new(command: str, *words: str | int, **folders: str) -> Words:
    """A command that makes `out`; folders: option → the name of an input."""

    def made(w: Path) -> list[object]:
        given = [x for option, name in folders.items() for x in (f"-{option}", w / name)]
        return [command, *given, *words, "-o", w / "out", "--force"]

    return made


def switched(name: str) -> Words:
    return lambda w: ["switch", "-m", w / name, "--from", w / "a", "--to", w / "b", "-b", w / "base"]


def second(*words: str, out: str) -> Words:
    return lambda w: [
        "export", "-m", w / "merged", "--graph-from", w / "base-onnx", *words, "-o", w / out, "--force",
    ]  # fmt: skip


def package_for(target: str, *words: str) -> Words:
    return lambda w: ["package", w / "run", "--for", target, *words, "-o", w / "out", "--force"]


DAILY = [
    Scene("merge", only(plain, "base", "a"), new("merge", b="base", a="a")),
    Scene("report", reported, lambda w: ["report", w / "run"]),
    Scene("switch", only(merged, "base", "a", "b", "merged"), switched("merged")),
    Scene(
        "combine", only(plain, "a", "b"),
        lambda w: ["combine", "-a", w / "a", "-a", w / "b", "-o", w / "out", "--force"],
    ),
    Scene("truncate", only(plain, "a"), new("truncate", "--rank", 1, a="a")),
    Scene("extract", only(merged, "base", "merged"), new("extract", "--rank", 2, b="base", m="merged")),
    Scene("verify", only(merged, "merged"), lambda w: ["verify", w / "merged"], notices=True),
]  # fmt: skip

SLOW = [
    Scene("picture", only(plain, "a"), lambda w: ["inspect", "-a", w / "a", "--picture", w / "a.svg", "--force"]),
    Scene(
        "validate", only(decoder, "base", "a", "merged"), lambda w: ["validate", *merging(w), "-m", w / "merged"]
    ),
    Scene("export", only(decoder, "merged"), new("export", "--provider", "cpu", m="merged")),
    Scene("reweight", only(exported, "merged", "base-onnx"), second(out="out")),
    Scene(
        "share", only(exported, "merged", "base-onnx", "shared"), second("--shared-as", "two", out="shared")
    ),
    Scene("switch an export", only(exported, "base", "a", "b", "onnx"), switched("onnx")),
    Scene(
        "benchmark", only(exported, "base-onnx", "onnx"), new("benchmark", *MARGIN, b="base-onnx", m="onnx")
    ),
    Scene("merge-and-export", only(ran, "base", "a"), new("merge-and-export", *MARGIN, b="base", a="a")),
    Scene("package hf", only(ran, "run"), package_for("hf")),
    Scene("package genai", only(ran, "run"), package_for("genai")),
    Scene("package an archive", only(ran, "run"), package_for("hf", "--archive", "tar.zst")),
    Scene("verify a run", only(ran, "run"), lambda w: ["verify", w / "run"], notices=True),
    Scene("verify a package", only(packaged, "package"), lambda w: ["verify", w / "package"], notices=True),
]  # fmt: skip


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scene], Path]:
    """The inputs of a scene, made once."""
    made: dict[str, Path] = {}

    def get(scene: Scene) -> Path:
        if scene.name not in made:
            folder = tmp_path_factory.mktemp("stock") / "in"
            folder.mkdir()
            scene.make(folder)
            made[scene.name] = folder
        return made[scene.name]

    return get
