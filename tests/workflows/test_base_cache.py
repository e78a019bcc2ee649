"""A second adapter of a base takes what is known of the base, and gets what it would get without."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export import pipeline
from lora_export.contracts import AdapterChoice, Source, Story, StoryOptions
from lora_export.onnx_export import load_export
from lora_export.progress import Silent
from lora_export.storage.sealed import hash_folder
from lora_export.workflows import base_cache, latency, run_exports
from tests.fleet.making import options, with_short_texts
from tests.validation.conftest import save_adapter, save_base

# What differs between two runs that computed the same: times, and words of the cache.
_OTHER = {
    "seconds",
    "export.json",
    "created",
    "cache",
    "benchmark",
    "validation_seed",
    "peak_rss_bytes",
    "output",
    "certificate",
}


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def stage(self, title: str) -> None:
        self.words.append(title)

    def detail(self, text: str) -> None:
        self.words.append(text)

    def warn(self, text: str) -> None:
        self.words.append(text)


class Shop:
    """A base with adapters, and runs of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_base(folder / "base", torch.float32)
        self.adapters = [save_adapter(self.base, folder / f"adapter-{i}", seed=1 + i) for i in range(2)]
        how = with_short_texts(options(), folder)
        self.how = replace(how, benchmark=replace(how.benchmark, max_seconds=None))

    def run(self, name: str, which: int = 0, told: Told | None = None, **more: Any) -> Story:
        how = replace(self.how, **{"cache": self.folder / "cache", **more})
        given = [AdapterChoice(self.adapters[which])]
        return pipeline.merge_and_export(Source("base", self.base), given, self.folder / name, how, told or Told())

    def files(self, name: str) -> Mapping[str, object]:
        run = self.folder / name
        every = {n: f.sha256 for n, f in hash_folder(run).items() if n.startswith(("merged/", "onnx/"))}
        return every | {"onnx/export.json": plain(json.loads((run / "onnx/export.json").read_text()))}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in _OTHER}
    return [plain(v) for v in value] if isinstance(value, list) else value


def report(shop: Shop, name: str) -> Any:
    document = json.loads((shop.folder / name / "report/report.json").read_text())
    return plain(document)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """A measurement that takes a second, and is a verdict."""
    measure = latency.measure_run

    def measured(base: Any, merged: Any, control: Any, how: StoryOptions, progress: Any) -> Any:
        short = replace(how, benchmark=replace(how.benchmark, max_seconds=1.0))
        found = measure(base, merged, control, short, progress)
        return replace(found, verdict="equivalent_by_structure")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure_run", measured)
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def first(shop: Shop, quick: None) -> Story:
    """A run that fills the cache."""
    return shop.run("first")


def taken(story: Story) -> dict[str, bool]:
    assert story.cache is not None
    return {part.what: part.taken for part in story.cache.parts}


def test_second_run_takes_what_is_known_and_gets_the_same(
    shop: Shop, first: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(taken(first).values()) and {"export", "measurement"} < set(taken(first))
    monkeypatch.setattr(run_exports, "export_as", _not_again)
    monkeypatch.setattr(run_exports, "control_of", _not_again)
    second = shop.run("second")
    assert all(taken(second).values()) and set(taken(second)) == set(taken(first))
    assert shop.files("second") == shop.files("first") and report(shop, "second") == report(shop, "first")
    assert second.benchmark is not None and first.benchmark is not None
    assert second.benchmark.cells == first.benchmark.cells and second.benchmark.samples == first.benchmark.samples
    assert "not measured again for this adapter" in second.benchmark.notes[-1]
    assert second.cache is not None and first.cache is not None and second.cache.key == first.cache.key
    hashes = {part.what: part.sha256 for part in second.cache.parts}
    assert hashes == {part.what: part.sha256 for part in first.cache.parts} and all(hashes.values())
    for page in ("report.html", "report.md"):
        text = (shop.folder / "second/report" / page).read_text()
        assert "What was known of the base" in text and hashes["export"]["model.onnx"] in text


def _not_again(*_: Any, **__: Any) -> Any:
    raise AssertionError("it is known")


@pytest.mark.slow
def test_second_adapter_gets_what_it_gets_without_a_cache(shop: Shop, first: Story) -> None:
    assert first.validate is not None
    seeded = replace(shop.how.validation, seed=first.validate.seed)
    alone = shop.run("alone", 1, cache=None, validation=seeded)
    second = shop.run("other", 1)
    assert alone.cache is None and all(taken(second).values())
    assert shop.files("other") == shop.files("alone") and report(shop, "other") == report(shop, "alone")


# --- with stand-ins for the stages ---------------------------------------------------------------------------


@pytest.fixture
def stages(shop: Shop, first: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run makes of its base, in place of making it."""
    calls: list[str] = []

    def run(told: Any, stage: Path, work: Path, worker: Any, beside: Any) -> Story:
        shared = told.shared
        if shared.export is None:
            calls.append("export")
            made = load_export(Path(shutil.copytree(shop.folder / "first/onnx", work / "base")))
            assert shared.keeper.export(made).output.is_dir()
        calls.append("answers" if shared.known is not None else "no answers")
        return replace(first, output=stage)

    monkeypatch.setattr(pipeline, "_run", run)
    monkeypatch.setattr(pipeline, "_relocated", lambda story, stage, output: story)
    return calls


def test_run_of_a_base_that_changed_in_place_takes_nothing(shop: Shop, stages: list[str], tmp_path: Path) -> None:
    keys = [shop.run("before", cache=tmp_path).cache]
    config = shop.base / "generation_config.json"
    before = config.read_text()
    try:
        config.write_text(before.replace("{", "{ ", 1))
        keys.append(shop.run("changed", cache=tmp_path).cache)
    finally:
        config.write_text(before)
    keys.append(shop.run("back", cache=tmp_path).cache)
    assert stages == ["export", "answers", "export", "answers", "answers"]
    found = [use.key for use in keys if use is not None]
    assert found[0] == found[2] != found[1]


def test_base_that_changes_while_it_is_exported_is_not_kept(
    shop: Shop, stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, config = base_cache.CachedBase.export, shop.base / "generation_config.json"
    before = config.read_text()

    def changed(self: Any, made: Any) -> Any:
        config.write_text(before + " ")
        return kept(self, made)

    monkeypatch.setattr(base_cache.CachedBase, "export", changed)
    try:
        use = shop.run("changing", cache=tmp_path).cache
    finally:
        config.write_text(before)
    assert use is not None and "changed while it was exported" in use.parts[0].note
    assert not list(tmp_path.glob("bases/*/onnx"))


def test_run_with_damage_in_its_cache_tells_and_computes(shop: Shop, stages: list[str], tmp_path: Path) -> None:
    cache, told = tmp_path / "cache", Told()
    shop.run("one", cache=cache)
    shop.run("two", cache=cache)
    assert stages == ["export", "answers", "answers"]
    data = next(cache.rglob("onnx/files/model.onnx.data"))
    changed = bytearray(data.read_bytes())
    changed[5] ^= 1
    data.unlink()
    data.write_bytes(changed)
    three = shop.run("three", cache=cache, told=told)
    assert stages[3:] == ["export", "answers"] and three.cache is not None
    assert any("damaged" in note for note in three.cache.notes) and any("computed anew" in w for w in told.words)
    shop.run("four", cache=cache)
    assert stages[5:] == ["answers"]


ALONE = {
    "graph_from": "--graph-from",
    "gptq": "--quantizer gptq",
    "touched": "--keep touched",
    "search": "--min-survival",
}


@pytest.mark.parametrize("why", ALONE)
def test_run_with_a_base_of_its_own_says_why(shop: Shop, why: str, tmp_path: Path) -> None:
    how, told = shop.how, Told()
    quantized = how.export.quantization
    export = {
        "graph_from": replace(how.export, graph_from=shop.base),
        "gptq": replace(how.export, precision="int4", quantization=replace(quantized, algorithm="gptq")),
        "touched": replace(how.export, precision="int4", quantization=replace(quantized, keep=("touched",))),
        "search": replace(how.export, precision="int4"),
    }[why]
    validation = replace(how.validation, min_survival=0.95 if why == "search" else None)
    how = replace(how, export=export, validation=validation, cache=tmp_path / "cache")
    given = None, Source("base", shop.base), [AdapterChoice(shop.adapters[0])], _planned(shop), how, told
    with base_cache.base_for(*given) as shared:
        assert shared.export is None and shared.known is None and shared.seed is None
        use = base_cache.use_of(shared, _story(shop))
    assert use is not None and not use.parts and ALONE[why] in use.notes[0] and len(told.words) == 1  # in one line
    assert not (tmp_path / "cache").exists()


def test_run_with_several_adapters_shares_the_export_alone(shop: Shop, tmp_path: Path) -> None:
    how = replace(shop.how, cache=tmp_path / "cache")
    adapters = [AdapterChoice(folder) for folder in shop.adapters]
    with base_cache.base_for(None, Source("base", shop.base), adapters, _planned(shop), how, Told()) as shared:
        assert shared.keeper is not None and shared.known is None and shared.seed is None


@pytest.mark.parametrize("place", ["a file", "of others", "no room"])
def test_run_whose_cache_cannot_be_used_goes_on(shop: Shop, stages: list[str], place: str, tmp_path: Path) -> None:
    told, cache = Told(), tmp_path / "cache"
    if place == "a file":
        cache.write_text("a file")
    else:
        cache.mkdir()
        cache.chmod(0o777 if place == "of others" else 0o700)
    story = shop.run(place, cache=cache, told=told, cache_size=1000 if place == "no room" else 10**9)
    assert stages[0] == "export" and story.cache is not None and (shop.folder / place / "report").is_dir()
    if place == "no room":
        assert "not kept" in story.cache.parts[0].note
    else:
        assert not story.cache.parts and "cannot be used" in story.cache.notes[0]


def _planned(shop: Shop) -> Any:
    from lora_export.merging import plan

    return plan(shop.base, [AdapterChoice(shop.adapters[0])], shop.how.merge)


def _story(shop: Shop) -> Story:
    from lora_export.contracts import MergeResult

    folder = shop.folder
    return Story(folder, MergeResult(folder, {}, {}, 0.0, 0, None, folder, "dequantized", "float32"))


# --- killed --------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from tests.workflows.test_base_cache import Shop
shop = Shop.__new__(Shop)
shop.folder, shop.base, shop.adapters, shop.how = __import__("pickle").loads(bytes.fromhex(sys.argv[1]))
print("begins", flush=True)
shop.run(sys.argv[2])
"""


@pytest.mark.slow
def test_run_killed_at_any_moment_leaves_a_cache_that_is_sound(shop: Shop, quick: None) -> None:
    import pickle

    how = replace(shop.how, cache=None)
    told = pickle.dumps((shop.folder, shop.base, shop.adapters, how)).hex()
    for turn in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", RUN, told, f"killed-{turn}"], stdout=subprocess.PIPE, start_new_session=True
        )
        assert child.stdout is not None and child.stdout.readline() == b"begins\n"
        time.sleep(2.0 + 3.0 * turn)
        child.send_signal(signal.SIGKILL)
        child.wait()
        words = Told()
        shop.run(f"after-{turn}", told=words, force=True)
        assert not any("damaged" in w for w in words.words)
