"""Packages, runs and models that name code: it would run without the lists, and nothing runs with them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner, Result

from lora_export.commands.main import cli
from lora_export.packages import archive
from lora_export.progress import Silent
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import hash_folder, read_sealed, write_sealed
from lora_export.workflows import delivered

Copied = Callable[..., Path]
SOURCE = '#include <stdio.h>\n__attribute__((constructor)) void f(void) { fclose(fopen("%s", "w")); }\n'


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that the library beside it writes as soon as it is loaded."""
    return tmp_path / "ran"


@pytest.fixture
def library(tmp_path: Path, canary: Path) -> Path:
    """Without a compiler, one that cannot be loaded."""
    made = tmp_path / "evil.so"
    (tmp_path / "evil.c").write_text(SOURCE % canary)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        made.write_bytes(b"\x7fELF no code")
    else:
        subprocess.run([compiler, "-shared", "-fPIC", "-o", made, tmp_path / "evil.c"], check=True)
    return made


def run(*words: object) -> Result:
    result = CliRunner().invoke(cli, [*map(str, words), "--json"])
    assert "Traceback" not in result.output and "internal error" not in result.output, result.output
    return result


def reseal(folder: Path) -> None:
    """Who changes a file can write another manifest."""
    document = read_sealed(folder / "manifest.json")
    document["files"] = {n: f for n, f in as_json(hash_folder(folder)).items() if n != "manifest.json"}
    write_sealed(folder / "manifest.json", document)


def armed(folder: Path, library: Path, name: str = "genai_config.json") -> Path:
    """An export or a package whose configuration names the library."""
    shutil.copyfile(library, folder / "evil.so")
    config = json.loads((folder / name).read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "evil.so"
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_planted_library_would_run_in_genai(decoder_run: Path, copied: Copied, library: Path, canary: Path) -> None:
    folder = armed(copied(decoder_run, "genai"), library)
    program = f"import onnxruntime_genai as og; og.Model(og.Config({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert canary.exists()


def test_verify_run_package_with_library_runs_nothing(
    decoder_run: Path, copied: Copied, library: Path, canary: Path, tmp_path: Path
) -> None:
    folder = armed(copied(decoder_run, "genai"), library)
    reseal(folder)
    packed = tmp_path / "p.zip"
    archive.write(folder, packed, "zip")
    for path in (folder, packed):
        result = run("verify", path, "--run")
        notes = [c["note"] for c in json.loads(result.stdout)["checks"] if not c["passed"]]
        assert result.exit_code == 1 and len(notes) == 1 and "evil.so" in notes[0]
    (folder / "evil.so").unlink()
    reseal(folder)
    result = run("verify", folder, "--run")
    assert result.exit_code == 1 and "model.decoder.session_options.custom_ops_library" in result.stdout
    assert '"runs"' not in result.stdout and not canary.exists()


def test_overlay_with_a_library_is_refused(decoder_run: Path, copied: Copied, library: Path) -> None:
    folder = armed(copied(decoder_run, "genai"), library, "genai_config.cuda.json")
    (folder / "evil.so").unlink()
    reseal(folder)
    result = run("verify", folder, "--run")
    assert result.exit_code == 1 and "genai_config.cuda.json" in result.stdout


def test_package_without_genai_config_is_refused(decoder_run: Path, copied: Copied) -> None:
    """genai would take manifest.json, which says more than this tool asks, for that of a package of its own."""
    folder = copied(decoder_run, "genai")
    (folder / "genai_config.json").unlink()
    reseal(folder)
    result = run("verify", folder, "--run")
    assert result.exit_code == 1 and "the package has no genai_config.json" in result.stdout


def test_triton_package_with_a_python_backend_is_refused(decoder_run: Path, copied: Copied) -> None:
    """Whose program would be the file that default_model_filename names, or model.py."""
    folder = copied(decoder_run, "triton")
    config = next(folder.rglob("config.pbtxt"))
    config.write_text(config.read_text().replace('"onnxruntime"', '"python"'))
    reseal(folder)
    result = run("verify", folder)
    assert result.exit_code == 1 and "default_model_filename" in result.stdout and "config.pbtxt" in result.stdout
    config.write_text(config.read_text().replace('default_model_filename: "model.onnx"', ""))
    reseal(folder)
    assert "adapter has no 1/model.py, which its backend python loads" in run("verify", folder).stdout
    (config.parent / "1" / "model.py").write_text("raise SystemExit")
    reseal(folder)
    assert "1/model.py is not a type of file that a package contains" in run("verify", folder).stdout


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "attn_implementation", "org/kernel"),
        ("config.json", "auto_map", {"AutoModel": "x.Y"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.Y", None]}),
        ("generation_config.json", "custom_generate", "org/x"),
    ],
)
def test_package_model_naming_code_is_refused(
    name: str, key: str, value: Any, decoder_run: Path, copied: Copied
) -> None:
    folder = copied(decoder_run, "hf")
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | {key: value}))
    reseal(folder)
    result = run("verify", folder, "--run")
    assert result.exit_code == 1 and key in result.stdout and name in result.stdout
    assert '"runs"' not in result.stdout


def test_commands_reading_export_with_library_run_nothing(
    decoder: tuple[Path, Path, Path], library: Path, canary: Path, tmp_path: Path
) -> None:
    base, adapter, made = decoder
    spoiled = Path(shutil.copytree(made, tmp_path / "run"))
    onnx = armed(spoiled / "onnx", library)
    reseal(spoiled)
    out = tmp_path / "out"
    pair = ("-b", base, "-a", adapter)
    for remove in (False, True):
        if remove:
            (onnx / "evil.so").unlink()
            reseal(spoiled)
        for words in (
            ("benchmark", "-m", onnx, "-o", out),
            ("benchmark", "-m", made / "onnx", "-b", onnx / "model.onnx", "-o", out),
            ("package", spoiled, "--for", "genai", "-o", out),
            ("validate", *pair, "-m", made / "merged", "--onnx", onnx),
            ("validate", *pair, "-m", made / "merged", "--onnx", made / "onnx", "--base-onnx", onnx),
            ("export", "-m", made / "merged", "--graph-from", onnx, "-o", out),
            ("merge-and-export", *pair, "--graph-from", onnx, "-o", out),
        ):
            result = run(*words)
            told = "evil.so is a shared library" if not remove else "custom_ops_library"
            assert result.exit_code == 1, words
            assert told in result.stdout, (words, result.stdout)
    assert not out.exists() and not canary.exists()


def test_commands_reading_model_with_kernel_load_none(
    decoder: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, made = decoder
    loaded: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> Any:
        loaded.append(name)
        raise ImportError(name)

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", load)
    evil, merged = (Path(shutil.copytree(p, tmp_path / p.name)) for p in (base, made / "merged"))
    for folder in (evil, merged):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "org/kernel"}))
    with pytest.raises(ImportError):
        transformers.AutoModelForCausalLM.from_pretrained(evil)  # the danger is real
    assert loaded.pop() == "org/kernel"
    out = tmp_path / "out"
    for words in (
        ("merge", "-b", evil, "-a", adapter, "-o", out),
        ("merge-and-export", "-b", evil, "-a", adapter, "-o", out),
        ("validate", "-b", evil, "-a", adapter, "-m", made / "merged"),
        ("validate", "-b", base, "-a", adapter, "-m", merged),
        ("export", "-m", merged, "-o", out),
        ("benchmark", "-m", made / "onnx", "--pytorch", evil, adapter, "-o", out),
    ):
        result = run(*words)
        assert result.exit_code == 1 and "attn_implementation is 'org/kernel'" in result.stdout, words
    assert not loaded and not out.exists()


# --- what an honest one says -------------------------------------------------------------------------------


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


def test_verify_run_unsigned_package_warns_first(decoder_run: Path, copied: Copied) -> None:
    told = Told()
    found = delivered.verify(copied(decoder_run, "genai"), None, True, None, told)
    assert found.verified and found.about["signature"] == "none"
    warned = next(i for i, line in enumerate(told.lines) if "the package is not signed" in line)
    assert warned < next(i for i, line in enumerate(told.lines) if "runs the package" in line)
    network = found.about["network_of_run"]
    assert network == "none" or any(network in line for line in told.lines)


def test_package_omits_licence_with_code(tmp_path: Path) -> None:
    from lora_export.packages.companions import licences

    for name in ("LICENSE", "NOTICE.so", "LICENSE.py", "copyright.pkl", "USE_POLICY.md"):
        (tmp_path / name).write_text("x")

    class Run:
        companions = tmp_path

    assert [p.name for p in licences(Run())] == ["LICENSE", "USE_POLICY.md"]  # type: ignore[arg-type]
