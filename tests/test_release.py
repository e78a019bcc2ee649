"""What a release states: which ONNX Runtime each platform gets, versions, workflows, and its bill of materials."""

import ast
import itertools
import re
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import lora_export
from lora_export import api
from tests.docs.pages import ROOT, tool

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# platform_machine as Python states it on each system, and as tools state it that resolve for another one.
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64", "ARM64", "x86", "i686", "armv7l", "ppc64le", "s390x", "riscv64")
SYSTEMS = ("linux", "win32", "darwin", "cygwin", "freebsd14")
ON_GPU = {("linux", "x86_64"), ("linux", "AMD64"), ("win32", "AMD64"), ("win32", "x86_64")}
WHEELS = [("onnxruntime-gpu", "onnxruntime"), ("onnxruntime-genai-cuda", "onnxruntime-genai")]


def chosen(requirements: list[str], names: tuple[str, str], system: str, machine: str) -> list[str]:
    """Those of two wheels that a platform gets; the wheels own the same folder."""
    here = {"sys_platform": system, "platform_machine": machine, "extra": ""}
    found = [Requirement(line) for line in requirements]
    return [r.name for r in found if r.name in names and (r.marker is None or r.marker.evaluate(here))]


@pytest.mark.parametrize("names", WHEELS)
def test_markers_choose_exactly_one_wheel_on_every_platform(names: tuple[str, str]) -> None:
    for system, machine in itertools.product(SYSTEMS, MACHINES):
        expected = names[0] if (system, machine) in ON_GPU else names[1]
        assert chosen(PROJECT["dependencies"], names, system, machine) == [expected], (system, machine)


def test_markers_no_extra_brings_another_wheel() -> None:
    extras = [Requirement(line).name for lines in PROJECT["optional-dependencies"].values() for line in lines]
    assert extras and not {name for pair in WHEELS for name in pair} & set(extras)


def test_changelog_newest_entry_is_the_version() -> None:
    entries = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(rf"\[{re.escape(lora_export.__version__)}\] - \d{{4}}-\d\d-\d\d", entries[0])
    assert len(entries) == len(set(entries)) > 1


def test_workflows_use_versioned_actions_and_known_targets() -> None:
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [f.stem for f in files] == ["ci", "release"]
    for file in files:
        jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            assert re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) if "uses" in step else step["run"]
            words = step.get("run", "").split()
            assert words[:1] != ["make"] or set(words[1:]) <= made
            assert words[:1] != [".ci/run"] or (ROOT / ".ci" / "run").is_file()


def test_typed_user_calls_every_function_of_the_api() -> None:
    tree = ast.parse((ROOT / "tools" / "typed_user.py").read_text(encoding="utf-8"))
    called = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
    }
    assert set(api.__all__) <= called


def test_bill_is_of_the_wheel_and_names_no_place() -> None:
    links = [{"type": "distribution", "url": "file:///somewhere/lora_export.whl"}]
    parts = ["lora-export", "torch", "sympy", "pip"]
    found = {
        "bomFormat": "CycloneDX",
        "metadata": {"tools": {}, "timestamp": "2026-11-30T00:00:00Z"},
        "components": [
            {"name": n, "version": "1", "bom-ref": f"{n}==1", "externalReferences": links, "licenses": [n]}
            for n in parts
        ],
        "dependencies": [
            {"ref": "lora-export==1", "dependsOn": ["torch==1"]},
            {"ref": "torch==1", "dependsOn": ["sympy==1"]},
            {"ref": "sympy==1"},
            {"ref": "pip==1"},
        ],
    }
    bill = tool("release").bill(found, "00ff")
    assert [c["name"] for c in bill["components"]] == ["torch", "sympy"]
    assert bill["components"][0] == {"name": "torch", "version": "1", "bom-ref": "torch==1", "licenses": ["torch"]}
    subject = bill["metadata"]["component"]
    assert (subject["name"], subject["purl"]) == ("lora-export", "pkg:pypi/lora-export@1")
    assert subject["hashes"] == [{"alg": "SHA-256", "content": "00ff"}]
    assert [d["ref"] for d in bill["dependencies"]] == ["lora-export==1", "torch==1", "sympy==1"]
    assert "://" not in str(bill)
