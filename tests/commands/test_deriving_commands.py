"""combine, truncate and extract on the command line: what they write, print and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lora_export.commands.main import cli
from lora_export.contracts import AdapterChoice
from lora_export.merging import merge
from tests.builders import lora, save_adapter, save_base, tensors


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two adapters of rank 4 and 3, and the base with the first merged."""
    folder = tmp_path_factory.mktemp("deriving")
    base = save_base(folder / "base")
    kinds = [lora(4, 7, target_modules=["q_proj", "down_proj"]), lora(3, 5, target_modules=["down_proj"])]
    a, b = (save_adapter(folder / f"a{i}", base, kind, seed=40 + i) for i, kind in enumerate(kinds))
    merge(base, [AdapterChoice(a)], folder / "merged")
    return {"base": base, "a": a, "b": b, "merged": folder / "merged"}


def run(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(w) for w in words])


def said(*words: Any) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def ranks(adapter: Path) -> set[int]:
    return {t.shape[0] for n, t in tensors(adapter).items() if "lora_A" in n}


def test_combine_command_writes_adapter(given: dict[str, Path], tmp_path: Path) -> None:
    both = ("combine", "-a", f"{given['a']}:0.7", "-a", given["b"])
    made = said(*both, "-o", tmp_path / "sum")
    assert ranks(tmp_path / "sum") == {4, 7} and made["error"] < 1e-12
    smaller = run(*both, "--rank", 2, "-o", tmp_path / "small")
    assert smaller.exit_code == 0 and ranks(tmp_path / "small") == {2}
    assert "2 in 4 modules" in smaller.stdout and "of its square is kept" in smaller.stdout
    again = run(*both, "-o", tmp_path / "small")
    assert again.exit_code == 1 and "--force" in again.stderr
    assert ranks(tmp_path / "small") == {2}
    assert said(*both, "--energy", "99.999%", "--force", "-o", tmp_path / "small")["error"] < 0.01
    dare = run(*both, "--combine", "dare_linear", "-o", tmp_path / "dare")
    assert dare.exit_code == 1 and "--density" in dare.stderr and not (tmp_path / "dare").exists()


def test_truncate_command_writes_adapter(given: dict[str, Path], tmp_path: Path) -> None:
    made = said("truncate", "-a", given["a"], "--rank", 1, "--dtype", "float16", "-o", tmp_path / "one")
    assert ranks(tmp_path / "one") == {1} and 0 < made["error"] < 1
    assert {str(t.dtype) for t in tensors(tmp_path / "one").values()} == {"torch.float16"}
    words = run("truncate", "-a", given["a"], "--energy", "60%", "-o", tmp_path / "most")
    assert words.exit_code == 0 and "in 4 modules" in words.stdout
    for refused, code, told in (
        ((), 1, "--rank"),
        (("--rank", 2, "--energy", "90%"), 1, "--energy"),
        (("--rank", 0), 2, "--rank"),
    ):
        result = run("truncate", "-a", given["a"], *refused, "-o", tmp_path / "none")
        assert (result.exit_code, (tmp_path / "none").exists()) == (code, False) and told in result.stderr


def test_extract_command_writes_adapter(given: dict[str, Path], tmp_path: Path) -> None:
    pair = ("extract", "-b", given["base"], "-m", given["merged"])
    made = said(*pair, "--rank", 4, "-o", tmp_path / "back")
    assert ranks(tmp_path / "back") == {4} and made["error"] < 1e-5
    words = run(*pair, "--energy", "90%", "--rest", "refuse", "-o", tmp_path / "less")
    assert words.exit_code == 0 and "in 4 modules" in words.stdout
    same = run("extract", "-b", given["base"], "-m", given["base"], "--rank", 4, "-o", tmp_path / "none")
    assert same.exit_code == 1 and not (tmp_path / "none").exists()
