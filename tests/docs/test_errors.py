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
def test_error_class_is_documented(error: type) -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {error.__name__}\n")[2].partition("\n## ")[0]
    assert "Cause: " in section and "Cure: " in section
    assert (inspect.getdoc(error) or "?").splitlines()[0] in section


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_error_class_is_raised_and_tested(error: type) -> None:
    assert any(r.error == error.__name__ for r in REFERENCE.refusals())
    expected = [f for f in TESTS.rglob("test_*.py") if f != Path(__file__) and _expects(f, error.__name__)]
    assert expected


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("with pytest.raises(InputError, match='no such'):\n        f()", True),
        ("with pytest.raises(errors.InputError) as refused:\n        f()", True),
        ("with pytest.raises(InputError):\n        f()", False),
        ("with pytest.raises((InputError, OSError), match='no'):\n        f()", False),
        ("with pytest.raises(OutputError, match='no'):\n        f()", False),
        ("with pytest.raises(InputError, match='no'):\n        pass", False),
    ],
)
def test_raises_names_one_error_and_matches_words(text: str, counts: bool, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(f"def test_x():\n    {text}\n")
    assert _expects(tmp_path / "test_x.py", "InputError") == counts
    (tmp_path / "test_x.py").write_text(f"def helper():\n    {text}\n")
    assert not _expects(tmp_path / "test_x.py", "InputError")


def _expects(file: Path, error: str) -> bool:
    """Whether a test has pytest.raises(error) around a call, and looks at what the error says."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tests = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))
    blocks = (n for test in tests for n in ast.walk(test) if isinstance(n, ast.With))
    return any(_is_of(item, error) for block in blocks if _calls(block) for item in block.items)


def _is_of(item: ast.withitem, error: str) -> bool:
    call = item.context_expr
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "pytest.raises" or not call.args:
        return False
    looks = item.optional_vars is not None or any(k.arg == "match" for k in call.keywords)
    return looks and ast.unparse(call.args[0]).removeprefix("errors.") == error


def _calls(block: ast.With) -> bool:
    return any(isinstance(n, ast.Call) for statement in block.body for n in ast.walk(statement))


def test_error_classes_are_in_one_module() -> None:
    """All that is told in words is of errors.py, so that a caller finds it there. Programs in packages import
    nothing of this project."""
    package = Path(errors.__file__).parent
    for file in [f for f in package.rglob("*.py") if f.parent.name != "served"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and file.name != "errors.py":
                bases = [ast.unparse(b) for b in node.bases]
                assert not [b for b in bases if b.endswith(("Error", "Exception", "Failed"))], (file, node.name)
