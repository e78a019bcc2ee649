"""Every error class is documented with cause and cure, raised by the package, and raised by a test."""

import ast
import inspect
from pathlib import Path

import pytest

from lora_export import errors
from tests.docs.pages import ROOT, tool

TESTS = ROOT / "tests"


REFERENCE = tool("reference")
CLASSES = REFERENCE.classes()


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_it_has_an_anchor_a_cause_and_a_cure(error: type) -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {error.__name__}\n")[2].partition("\n## ")[0]
    assert "Cause: " in section and "Cure: " in section
    assert (inspect.getdoc(error) or "?").splitlines()[0] in section


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_it_is_raised_by_the_package_and_expected_by_a_test(error: type) -> None:
    assert any(r.error == error.__name__ for r in REFERENCE.refusals())
    expected = [f for f in TESTS.rglob("test_*.py") if f != Path(__file__) and _expects(f, error.__name__)]
    assert expected


def _expects(file: Path, error: str) -> bool:
    """Whether a test says pytest.raises(error, …)."""
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "pytest.raises"
        and node.args
        and error in ast.unparse(node.args[0]).replace("errors.", "").strip("()").split(", ")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    )


def test_no_class_of_errors_lies_elsewhere() -> None:
    """All that is told in words is of errors.py, so that a caller finds it there."""
    package = Path(errors.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and file.name != "errors.py":
                bases = [ast.unparse(b) for b in node.bases]
                assert not [b for b in bases if b.endswith(("Error", "Exception", "Failed"))], (file, node.name)
