"""A byte of any file, a file more, less or elsewhere, a link, a name that leads out: `verify` exits 1 and tells."""

import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner

from lora_export.commands.main import cli
from lora_export.contracts import PackageOptions
from lora_export.errors import InputError
from lora_export.packages import archive
from lora_export.progress import Silent
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import read_sealed, write_sealed
from lora_export.workflows.packaging import package
from tests.packages.conftest import Packed
from tests.packages.test_packages import ALL

Copied = Callable[..., Path]


def verify(path: Path, *words: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli, ["verify", str(path), "--json", *map(str, words)])
    assert "Traceback" not in result.output and "internal error" not in result.output, result.output
    return result.exit_code, json.loads(result.stdout)


def notes(document: dict[str, Any]) -> str:
    if "checks" not in document:
        return json.dumps(document)
    return "\n".join(c["note"] for c in document["checks"] if not c["passed"])


@pytest.mark.parametrize(("run", "target"), ALL)
def test_verify_package_one_changed_byte_is_found(
    run: str, target: str, packed: Packed, copied: Copied, request: pytest.FixtureRequest
) -> None:
    folder = copied(request.getfixturevalue(run), target, **_quick(target))
    assert verify(folder)[0] == 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        before = path.read_bytes()
        for at in {0, len(before) // 2, len(before) - 1}:
            changed = bytearray(before)
            changed[at] ^= 1
            path.write_bytes(changed)
            code, document = verify(folder)
            assert code == 1 and path.name in notes(document), (path, at, document)
        path.write_bytes(before)
    assert verify(folder)[0] == 0


def _quick(target: str) -> dict[str, Any]:
    return {"variants": ("fp32", "q4")} if target == "transformers-js" else {}


@pytest.mark.parametrize(("run", "target"), ALL)
def test_verify_package_missing_extra_or_moved_file_is_found(
    run: str, target: str, copied: Copied, request: pytest.FixtureRequest
) -> None:
    folder = copied(request.getfixturevalue(run), target, **_quick(target))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        away = folder.parent / "away"
        path.rename(away)
        code, document = verify(folder)
        assert code == 1 and path.name in notes(document), (path, document)
        away.rename(path)
        if path.name == "manifest.json":
            continue
        renamed = path.with_name(path.name + "x")
        path.rename(renamed)
        code, document = verify(folder)
        assert code == 1 and f"{renamed.name} was added" in notes(document), document
        renamed.rename(path)
    (folder / "more.py").write_text("import os")
    (folder / "empty").mkdir()
    code, document = verify(folder)
    assert code == 1 and "more.py was added" in notes(document) and "empty/ was added" in notes(document)


def test_verify_package_link_is_refused(decoder_run: Path, copied: Copied) -> None:
    folder = copied(decoder_run, "genai")
    (folder / "NOTICE").rename(folder.parent / "NOTICE")
    (folder / "NOTICE").symlink_to(folder.parent / "NOTICE")
    code, document = verify(folder)
    assert code == 1 and "NOTICE is a link" in notes(document)


@pytest.mark.parametrize("name", ["../NOTICE", "/etc/passwd", "a/../../b", "", ".", "a//b", "C:b", "a\\b"])
def test_verify_package_manifest_path_outside_is_refused(name: str, decoder_run: Path, copied: Copied) -> None:
    folder = copied(decoder_run, "genai")
    (folder.parent / "NOTICE").write_text("outside")
    document = read_sealed(folder / "manifest.json")
    document["files"][name] = document["files"].pop("NOTICE")
    write_sealed(folder / "manifest.json", document)
    code, found = verify(folder)
    assert code == 1 and "outside the package" in notes(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "other"), ("target", 3), ("name", "../.."), ("name", "a'b"), ("providers", []),
        ("providers", ["tpu"]), ("variants", ["q4'; x"]), ("onnx_adapters", ["../x"]), ("task", "cooking"),
        ("sample", {"prompt": 3, "text": None, "numbers": []}), ("files", []), ("schema_version", "1"),
        ("latency", {}), ("architecture", None),
    ],
)  # fmt: skip
def test_verify_package_damaged_manifest_is_refused(
    key: str, value: Any, decoder_run: Path, copied: Copied
) -> None:
    folder = copied(decoder_run, "triton")
    write_sealed(folder / "manifest.json", {**read_sealed(folder / "manifest.json"), key: value})
    code, found = verify(folder, "--run")
    assert code == 1 and "runs" not in {c["name"] for c in found.get("checks", [])}
    result = CliRunner().invoke(cli, ["inspect", str(folder), "--json"])
    assert result.exit_code in (0, 1) and "internal error" not in result.output


@pytest.mark.parametrize("called", ["model.onnx", "graph.dat"])
def test_verify_run_graph_reading_elsewhere_is_not_run(called: str, decoder_run: Path, copied: Copied) -> None:
    """With a manifest that fits: who changes a file can write another manifest. Whatever the graph is called."""
    import onnx

    from lora_export.storage.sealed import hash_folder

    folder = copied(decoder_run, "genai")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = "../outside"
    (folder / "model.onnx").unlink()
    (folder / called).write_bytes(model.SerializeToString())
    config = (folder / "genai_config.json").read_text()
    (folder / "genai_config.json").write_text(config.replace('"model.onnx"', f'"{called}"'))
    document = read_sealed(folder / "manifest.json")
    document["files"] = {n: f for n, f in as_json(hash_folder(folder)).items() if n != "manifest.json"}
    write_sealed(folder / "manifest.json", document)
    code, found = verify(folder, "--run")
    refusal = "../outside" if called == "model.onnx" else "is not a type of file that a package contains"
    assert code == 1 and called in notes(found) and refusal in notes(found)
    assert "runs" not in {c["name"] for c in found["checks"]}


# --- the signature -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.pem, a.pub, b.pem, b.pub, and rsa.pem, which cannot sign."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    folder = tmp_path_factory.mktemp("keys")
    private = (form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    for name in ("a", "b"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{name}.pem").write_bytes(key.private_bytes(*private))
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    (folder / "rsa.pem").write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*private))
    return folder


def test_verify_package_signature_passes(decoder_run: Path, keys: Path, tmp_path: Path) -> None:
    folder = package(decoder_run, "hf", tmp_path / "p", PackageOptions(key=keys / "a.pem"), Silent()).output
    code, found = verify(folder, "--key", keys / "a.pub")
    assert code == 0 and any(c["name"] == "signature" for c in found["checks"])
    code, found = verify(folder)
    assert code == 0 and any("--key" in text for text in found["not_checked"])
    code, found = verify(folder, "--key", keys / "b.pub")
    assert code == 1 and "model.sig" in notes(found)
    # The format's own tool agrees.
    command = ["model_signing", "verify", "key", folder, "--signature", folder / "model.sig"]
    import sys

    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--public_key", str(keys / "a.pub")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_verify_package_forged_manifest_fails_signature(decoder_run: Path, keys: Path, tmp_path: Path) -> None:
    folder = package(decoder_run, "hf", tmp_path / "p", PackageOptions(key=keys / "a.pem"), Silent()).output
    before = (folder / "manifest.json").read_bytes()
    document = read_sealed(folder / "manifest.json")
    document["base"]["name"] = "another base"
    write_sealed(folder / "manifest.json", document)
    code, found = verify(folder, "--key", keys / "a.pub")
    assert code == 1 and "model.sig" in notes(found)
    (folder / "manifest.json").write_bytes(before)
    signature = (folder / "model.sig").read_bytes()
    for at in range(0, len(signature), max(1, len(signature) // 40)):
        changed = bytearray(signature)
        changed[at] ^= 1
        (folder / "model.sig").write_bytes(changed)
        code, found = verify(folder, "--key", keys / "a.pub")
        assert code == 1 and "model.sig" in notes(found), at
    (folder / "model.sig").unlink()
    code, found = verify(folder, "--key", keys / "a.pub")
    assert code == 1 and "model.sig is missing" in notes(found)


def test_package_unusable_key_is_refused_first(decoder_run: Path, keys: Path, tmp_path: Path) -> None:
    for key in (keys / "rsa.pem", keys / "a.pub", keys / "nothing.pem"):
        with pytest.raises(InputError, match="not a key to sign with"):
            package(decoder_run, "hf", tmp_path / "p", PackageOptions(key=key), Silent())
    assert not list(tmp_path.iterdir())


# --- archives from elsewhere -------------------------------------------------------------------------------

OUTSIDE = ["../outside", "/outside", "a/../../outside", "a//b", "./a", "C:a", "a\\..\\b", "a\nb/../c"]


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    raw = BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as out:
        for info, data in members:
            info.size = len(data)
            out.addfile(info, BytesIO(data))
    path.write_bytes(zstandard.ZstdCompressor().compress(raw.getvalue()))
    return path


@pytest.mark.parametrize("name", OUTSIDE)
def test_verify_archive_leading_out_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as out:
        out.writestr(name, "x")
    made = [tmp_path / "p.zip", tar_of(tmp_path / "p.tar.zst", (tarfile.TarInfo(name), b"x"))]
    for path in made:
        (tmp_path / "deep" / path.name).mkdir(parents=True)
        with pytest.raises(InputError, match="outside the package"):
            archive.extract(path, tmp_path / "deep" / path.name)
        assert verify(path)[0] == 1
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_verify_tar_with_other_entries_is_refused(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not a file"):
        archive.extract(tar_of(tmp_path / "p.tar.zst", (info, b"")), tmp_path / "out")


def test_verify_zip_with_link_is_refused(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("link")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as out:
        out.writestr(entry, "/etc/passwd")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not a file"):
        archive.extract(tmp_path / "p.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_verify_damaged_archive_is_refused(kind: str, decoder_run: Path, tmp_path: Path) -> None:
    whole = package(decoder_run, "genai", tmp_path / "p", PackageOptions(archive=kind), Silent()).output
    data = whole.read_bytes()
    for name, damaged in {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"no archive at all",
        "flipped": data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 1]) + data[len(data) // 3 + 1 :],
    }.items():
        path = tmp_path / f"{name}.{kind}"
        path.write_bytes(damaged)
        assert verify(path)[0] == 1, name


def test_verify_not_a_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for words in ([tmp_path / "nothing"], [tmp_path / "folder", "--run"], [tmp_path / "folder"]):
        assert verify(*words)[0] == 1


def test_verify_package_with_base_is_refused(decoder: tuple[Path, Path, Path], packed: Packed) -> None:
    base, _, run = decoder
    code, document = verify(packed(run, "hf").output, "-b", base)
    assert code == 1 and "a merged folder or a run" in document["expected"]
