"""Switched exports are fresh exports byte for byte; live sessions compute what a fresh session computes."""

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from lora_export.contracts import AdapterChoice, ExportOptions
from lora_export.errors import InputError
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from lora_export.serving import Plugged, Swapped
from lora_export.workflows.pluggable import export_pluggable
from lora_export.workflows.switching import switch
from tests.daily import daily
from tests.onnx_export.conftest import save_llama
from tests.onnx_export.test_pluggable import save_lora

PRECISIONS = ["fp32", "fp16", "int4"]
TARGETS = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "v_proj", "o_proj"]}
LAZY = {"export.json"}  # it tells how long the export took


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("switching")
    base = save_llama(folder / "base", seed=6)
    found = {"base": base}
    for i, (name, targets) in enumerate(TARGETS.items()):
        found[name] = save_lora(base, folder / name, i, target_modules=targets)
        found[f"merged-{name}"] = merge(base, [AdapterChoice(found[name])], folder / f"merged-{name}").output
    return found


@pytest.fixture(scope="module")
def exports(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("exports")

    def make(name: str, precision: str) -> Path:
        out = folder / f"{name}-{precision}"
        if out.exists():
            return out
        if name == "base":
            export(given["base"], out, ExportOptions(precision, "cpu"), progress=Silent())  # type: ignore[arg-type]
        else:
            reweight(make("base", precision), given[f"merged-{name}"], out, progress=Silent())
        return out

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in LAZY}


def choice(given: dict[str, Path], name: str) -> list[AdapterChoice]:
    return [AdapterChoice(given[name])]


@pytest.mark.parametrize("precision", daily(PRECISIONS, ("fp32", "int4")))
def test_switch_export_ten_times_equals_fresh_export(
    given: Any, exports: Any, tmp_path: Path, precision: str
) -> None:
    folder = Path(shutil.copytree(exports("a", precision), tmp_path / "onnx"))
    half = [AdapterChoice(given["b"], 0.5)]
    steps = [choice(given, n) for n in "aba"] + [half] + [choice(given, n) for n in "bababa"] + [half]
    for before, after in itertools.pairwise(steps):
        switch(folder, given["base"], before, after, Silent())
        name = after[0].folder.name
        if after != half:
            assert contents(folder) == contents(exports(name, precision)), name
    merged = merge(given["base"], half, tmp_path / "merged").output
    reweight(exports("base", precision), merged, tmp_path / "fresh", progress=Silent())
    assert contents(folder) == contents(tmp_path / "fresh")


def test_switch_export_from_other_adapter_is_refused(given: Any, exports: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports("a", "fp32"), tmp_path / "onnx"))
    with pytest.raises(InputError, match="does not hold this adapter"):
        switch(folder, given["base"], choice(given, "b"), choice(given, "a"), Silent())
    other = save_llama(tmp_path / "other", seed=7)
    with pytest.raises(InputError, match="another hash"):
        switch(folder, other, choice(given, "a"), choice(given, "b"), Silent())
    (folder / "c.onnx_adapter").write_bytes(b"")
    with pytest.raises(InputError, match="other adapters share the weights of this folder: c"):
        switch(folder, given["base"], choice(given, "a"), choice(given, "b"), Silent())
    (folder / "c.onnx_adapter").unlink()
    assert contents(folder) == contents(exports("a", "fp32"))


# --- live ---------------------------------------------------------------------------------------------------


def feeds(session: ort.InferenceSession, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    found = {}
    for i in session.get_inputs():
        if "past" in i.name:
            shape = [1 if d == "batch_size" else 0 if isinstance(d, str) else d for d in i.shape]
            found[i.name] = np.zeros(shape, {"tensor(float)": np.float32, "tensor(float16)": np.float16}[i.type])
        else:
            found[i.name] = np.ones((1, 9), np.int64) if "mask" in i.name else np.arange(4, 13)[None]
    return found


def logits(folder: Path) -> np.ndarray:
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], feeds(session))[0], np.float64)


def near(found: Any, wanted: np.ndarray, precision: str) -> bool:
    tolerance = {"fp32": 1e-3, "fp16": 0.1, "int4": 1.0}[precision]  # int4 products are rounded to int8 elsewhere
    return bool(np.abs(np.asarray(found[0], np.float64) - wanted).max() < tolerance * np.abs(wanted).max())


def test_live_switch_to_other_graph_is_refused(exports: Any) -> None:
    swapped = Swapped(exports("a", "fp32"), "cpu")
    with pytest.raises(InputError, match="other inputs or outputs"):
        swapped.switch(exports("b", "fp16"))
    assert swapped.folder == exports("a", "fp32")


def test_live_switch_requests_meet_one_adapter(exports: Any) -> None:
    """While threads ask without a pause, the adapter changes ten times: no answer is of both."""
    folders = [exports(n, "fp32") for n in "ab"]
    live = Swapped(folders[0], "cpu")
    given = feeds(live.session)
    answers = [Swapped(f, "cpu").run(["logits"], given)[0] for f in folders]
    odd, asked, stop = [], [0, 0], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            found = live.run(["logits"], given)[0]
            same = [np.array_equal(found, a) for a in answers]
            if any(same):
                asked[same.index(True)] += 1
            else:
                odd.append(found)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(10):
        before = sum(asked)
        while sum(asked) < before + 20 and all(t.is_alive() for t in threads):
            pass
        live.switch(folders[(i + 1) % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not odd and min(asked) > 20


def test_plugged_adapters_are_chosen_by_name(given: dict[str, Path], exports: Any, tmp_path: Path) -> None:
    sources = [given[n] for n in "ab"]
    export_pluggable(given["base"], sources, tmp_path / "plug", ExportOptions("fp32", "cpu"), Silent())
    live = Plugged(tmp_path / "plug", "cpu")
    assert live.adapters == ["a", "b"]
    for name in "ab":
        assert near(live.run(["logits"], feeds(live.session), name), logits(exports(name, "fp32")), "fp32")
    assert near(live.run(["logits"], feeds(live.session)), logits(exports("base", "fp32")), "fp32")
    live.add("again", tmp_path / "plug" / "a.onnx_adapter")
    same = [live.run(["logits"], feeds(live.session), n)[0] for n in ("a", "again")]
    assert np.array_equal(*same)
    with pytest.raises(InputError, match="there is no adapter 'c'") as refused:
        live.run(None, {}, "c")
    assert refused.value.expected == "a, again, b"
    with pytest.raises(InputError, match="no slots"):
        Plugged(exports("a", "fp32"), "cpu")
