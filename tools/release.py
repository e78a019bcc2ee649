"""A release from a checkout: checks the distributions in dist/, and puts their bill of materials beside them.

make release      # wheel and sdist, the wheel tried in an environment of its own (`make smoke`), then this

    python tools/release.py INTERPRETER     # of the environment that has the wheel and nothing else
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# What a user imports: docs/reference/api.md. Whatever these refer to is checked with them.
PUBLIC = ("api", "contracts", "errors", "progress", "serving")
INSIDE = ("lora_export/py.typed", "lora_export/report/templates/report.html.j2")


def version() -> str:
    """The one place that states it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "lora_export" / "version.py").read_text(), re.MULTILINE)
    assert found
    return found[1]


def run(*words: str | Path, **variables: str) -> str:
    """The output of a tool of this environment. One that fails ends this program, with what it said."""
    name = Path(sys.executable).with_name(str(words[0]))
    done = subprocess.run(
        [str(name), *map(str, words[1:])], cwd=tempfile.gettempdir(), env=os.environ | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{words[0]} {words[1]}: {done.stdout}")
    return done.stdout


def check_changes() -> None:
    """The newest entry of CHANGELOG.md is this version's."""
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and re.fullmatch(re.escape(f"[{version()}]") + r" - \d{4}-\d\d-\d\d", newest[1]), newest


def check_wheel(wheel: Path) -> None:
    """Pure Python of any ABI, typed, with its licence and nothing of the checkout beside the package."""
    assert wheel.name.endswith("-py3-none-any.whl"), wheel
    with zipfile.ZipFile(wheel) as archive:
        names, info = archive.namelist(), f"lora_export-{version()}.dist-info"
        assert {name.partition("/")[0] for name in names} == {"lora_export", info}
        assert {*INSIDE, f"{info}/licenses/LICENSE"} <= set(names)
        assert "Root-Is-Purelib: true" in archive.read(f"{info}/WHEEL").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == version() and metadata["License-Expression"] == "Apache-2.0"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.get_all("Classifier") == declared["classifiers"]
    plain = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(plain) == len(declared["dependencies"])


def check_source(sdist: Path, wheel: Path) -> None:
    """The sdist makes the same wheel, byte for byte, and holds no part of the tests."""
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        source = Path(work) / sdist.name.removesuffix(".tar.gz")
        assert not (source / "tests").exists() and (source / "CHANGELOG.md").is_file()
        run("python", "-m", "build", "--wheel", "--outdir", work, source)
        assert (Path(work) / wheel.name).read_bytes() == wheel.read_bytes(), "the sdist makes another wheel"


def check_types(interpreter: Path) -> None:
    """pyright sees what a user sees: a program in strict mode, and every type of the public modules known."""
    first = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    seen = {"PATH": first, "VIRTUAL_ENV": str(interpreter.parents[1])}
    with tempfile.TemporaryDirectory() as work:
        program = Path(work) / "typed_user.py"
        program.write_bytes((ROOT / "tools" / "typed_user.py").read_bytes())
        run("pyright", program, **seen)
    for name in PUBLIC:
        run("pyright", "--verifytypes", f"lora_export.{name}", "--ignoreexternal", **seen)


def bill(found: dict[str, Any], wheel_sha256: str) -> dict[str, Any]:
    """An environment's bill of materials as the wheel's.

    The wheel becomes what the bill is of, components that it does not depend on go, and so do links: they name
    registries and files of the machine that made the bill, and purls say the same.
    """
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in found["dependencies"]}
    (subject,) = (c for c in found["components"] if c["name"] == "lora-export")
    reached, ahead = set[str](), [subject["bom-ref"]]
    while ahead:
        if (ref := ahead.pop()) not in reached:
            reached.add(ref)
            ahead += needs.get(ref, [])
    kept = [
        {key: value for key, value in component.items() if key != "externalReferences"}
        for component in found["components"]
        if component["bom-ref"] in reached
    ]
    subject = next(c for c in kept if c["name"] == "lora-export") | {
        "hashes": [{"alg": "SHA-256", "content": wheel_sha256}],
        "purl": f"pkg:pypi/lora-export@{subject['version']}",
    }
    return found | {
        "metadata": {k: v for k, v in found["metadata"].items() if k != "tools"} | {"component": subject},
        "components": [c for c in kept if c["name"] != "lora-export"],
        "dependencies": [entry for entry in found["dependencies"] if entry["ref"] in reached],
    }


def write_bill(interpreter: Path, wheel: Path) -> Path:
    import hashlib

    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    made = run("cyclonedx-py", "environment", "--output-reproducible", "--short-PURLs", "--sv", "1.6", interpreter)
    text = json.dumps(bill(json.loads(made), hashlib.sha256(wheel.read_bytes()).hexdigest()), indent=1) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert wrong is None, wrong
    out = DIST / f"lora_export-{version()}.cdx.json"
    out.write_text(text, encoding="utf-8")
    return out


def main(interpreter: Path) -> None:
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_changes()
    check_wheel(wheel)
    run("twine", "check", "--strict", wheel, sdist)
    run("check-wheel-contents", wheel)
    check_source(sdist, wheel)
    check_types(interpreter)
    listed = write_bill(interpreter, wheel)
    for file in (wheel, sdist, listed):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
