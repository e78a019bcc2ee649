"""Generic graphs of decoders beside Optimum's export of the same models, in its own environment."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_decoders.py"
MOST = 0.6  # of Optimum's nodes


def tool() -> ModuleType:
    found = importlib.util.spec_from_file_location("bench_decoders", TOOL)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2"])
def test_generic_decoder_has_fewer_nodes_than_optimum(name: str, tmp_path: Path) -> None:
    bench = tool()
    model, ours, theirs = (tmp_path / part for part in ("model", "ours", "optimum"))
    bench.save(name, model)
    bench.export_both(model, ours, theirs)
    assert bench.nodes(ours) <= MOST * bench.nodes(theirs)
    arms = {"ours": bench.session(ours), "optimum": bench.session(theirs)}
    assert set(bench.milliseconds(arms, (2, 5, 3), 3)) == {"ours", "optimum"}  # both take the same inputs
