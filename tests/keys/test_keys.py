"""Keys name contents, options and versions and nothing else; the cache of hashes never says what is not so."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import FleetRow, PackageOptions, StoryOptions
from lora_export.errors import InputError
from lora_export.keys import hashes
from lora_export.keys import inputs as keys
from lora_export.keys.hashes import Contents, Hashes
from lora_export.keys.inputs import Spelled, base_inputs, key_of, row_inputs


def adapter(folder: Path, weights: bytes = b"numbers", config: str = '{"r": 4}') -> Path:
    """Files as an adapter has them: a header of 2 bytes, and what stands for its tensors."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + weights)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"base")
    return folder


def row(name: str = "a", **more: Any) -> FleetRow:
    return FleetRow(name, "b", "owner/base", ("owner/lora",), **more)


def key(one: FleetRow, base: Path, *adapters: Path, weight: float = 1.0) -> str:
    kept = Hashes(None)
    return key_of(row_inputs(one, kept.of(base), [(kept.of(a), weight) for a in adapters]))


# --- keys ----------------------------------------------------------------------------------------------------


def test_key_same_contents_elsewhere_have_the_same_key(base: Path, tmp_path: Path) -> None:
    first = adapter(tmp_path / "first")
    other = adapter(tmp_path / "deep" / "other")
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    (other / ".hidden").touch()
    (other / "optimizer.pt").touch()
    elsewhere = replace(row("other"), base="c", model=str(moved), adapters=(str(other),))
    assert key(row(), base, first) == key(elsewhere, moved, other)
    one, two = tmp_path / "style.safetensors", tmp_path / "renamed.safetensors"
    for file in (one, two):
        file.write_bytes(b"style")
    assert key(row(), base, one) == key(row(), base, two)


def _story(**changes: Any) -> StoryOptions:
    options = StoryOptions()
    for path, value in changes.items():
        outer, _, inner = path.partition("__")
        options = replace(
            options, **{outer: replace(getattr(options, outer), **{inner: value}) if inner else value}
        )
    return options


CHANGES: dict[str, Callable[[FleetRow], FleetRow]] = {
    "dtype": lambda r: replace(r, options=_story(merge__dtype="float32")),
    "precision": lambda r: replace(r, options=_story(export__precision="int4")),
    "tolerance": lambda r: replace(r, options=_story(validation__tolerance=5.0)),
    "survival": lambda r: replace(r, options=_story(validation__min_survival=0.5)),
    "seed": lambda r: replace(r, options=_story(validation__seed=5)),
    "benchmark": lambda r: replace(r, options=_story(benchmark__shapes=((1, 8),))),
    "folder": lambda r: replace(r, options=_story(merged_folder=False)),
    "target": lambda r: replace(r, target="genai"),
    "package": lambda r: replace(r, target="triton", package=PackageOptions(backend="python")),
    "other backend": lambda r: replace(r, target="triton", package=PackageOptions(backend="onnxruntime")),
    "package's name": lambda r: replace(r, target="triton", package=PackageOptions(name="a")),
    "keep": lambda r: replace(r, target="genai", keep="both"),
}


def test_key_each_change_of_an_option_is_another_key(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one")
    found = {name: key(change(row()), base, one) for name, change in CHANGES.items()}
    assert len({*found.values(), key(row(), base, one)}) == len(CHANGES) + 1


def test_key_options_that_change_no_byte_do_not_matter(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one")
    for same in (
        _story(merge__max_memory=5 * 10**9), _story(merge__certify="full"), _story(merge__device="cuda"),
        _story(export__proof="full"), _story(validation__max_memory=10**9), _story(configured="x.toml"),
        _story(benchmark__configured="x.toml"),
    ):  # fmt: skip
        assert key(row(options=same), base, one) == key(row(), base, one)
    assert key(row(package=PackageOptions(backend="python")), base, one) == key(row(), base, one)  # none is made


def test_key_each_change_of_an_input_is_another_key(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one")
    found = {key(row(), base, one), key(row(), base, one, weight=0.5), key(row(), base, one, one)}
    found.add(key(row(), base, adapter(tmp_path / "weights", weights=b"others!")))
    found.add(key(row(), base, adapter(tmp_path / "config", config='{"r": 8}')))
    (base / "tokenizer.json").write_text("{}")
    found.add(key(row(), base, one))
    (base / "tokenizer.json").rename(base / "vocab.json")
    found.add(key(row(), base, one))
    (base / "modules.json").write_text("[]")
    found.add(key(row(), base, one))
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "model.safetensors").write_bytes(b"dense")
    found.add(key(row(), base, one))
    assert len(found) == 9


def test_key_names_versions_of_everything_that_writes_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = keys.versions()
    names = " ".join(versions)
    assert all(n in names for n in ("lora-export", "torch", "transformers", "peft", "onnxruntime", "genai"))
    one = adapter(tmp_path / "one")
    found = {key(row(), base, one), key_of(base_inputs(row().options, Hashes(None).of(base)))}
    for name in versions:
        monkeypatch.setattr(keys, "versions", lambda name=name: {**versions, name: "0"})
        found |= {key(row(), base, one), key_of(base_inputs(row().options, Hashes(None).of(base)))}
    assert len(found) == 2 * (len(versions) + 1)


def test_key_a_file_option_stands_for_its_contents(base: Path, tmp_path: Path) -> None:
    one, text, same = adapter(tmp_path / "one"), tmp_path / "text.txt", tmp_path / "same.txt"
    for path in (text, same):
        path.write_text("words")
    for option in ("validation__text", "validation__prompts"):
        first = key(row(options=_story(**{option: text})), base, one)
        assert first == key(row(options=_story(**{option: same})), base, one) != key(row(), base, one)
        same.write_text("other words")
        assert first != key(row(options=_story(**{option: same})), base, one)
        same.write_text("words")
    with pytest.raises((InputError, OSError)):
        key(row(options=_story(validation__text=tmp_path / "none")), base, one)
    signed = [replace(row(), target="hf", package=PackageOptions(key=text)) for _ in "ab"]
    assert key(signed[0], base, one) == key(signed[1], base, one) != key(replace(row(), target="hf"), base, one)
    assert hashlib.sha256(b"words").hexdigest() not in str(row_inputs(signed[0], {}, []))  # the private key


def test_key_of_a_base_is_its_files_and_how_it_is_exported(base: Path) -> None:
    files = Hashes(None).of(base)
    plain = key_of(base_inputs(row().options, files))
    for same in ("target", "tolerance", "benchmark", "seed", "package"):
        assert key_of(base_inputs(CHANGES[same](row()).options, files)) == plain
    others = {key_of(base_inputs(CHANGES[name](row()).options, files)) for name in ("dtype", "precision")}
    others.add(key_of(base_inputs(row().options, {**files, "config.json": "0" * 64})))
    assert len(others | {plain}) == 4


def test_key_spelled_once_is_the_same_key(base: Path, tmp_path: Path) -> None:
    kept, spelled = Hashes(None), Spelled()
    pairs = [(kept.of(adapter(tmp_path / name, name.encode())), 0.5) for name in ("one", "two")]
    for pair in pairs:
        inputs = row_inputs(row(), kept.of(base), [pair], spelled)
        assert key_of(inputs, spelled) == key_of(row_inputs(row(), kept.of(base), [pair]))


# --- hashes --------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are settled as soon as they are written."""
    monkeypatch.setattr(hashes, "SETTLED", -(10**12))


@pytest.mark.usefixtures("at_once")
def test_hashes_are_read_once_and_after_every_change(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "hashes.sqlite"
    first = Hashes(cache)
    before = first.of(base)
    assert before["model.safetensors"] == hashlib.sha256(b"base").hexdigest() and first.read > 0
    again = Hashes(cache)
    assert again.of(base) == before and again.read == 0
    weights = base / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(b"BASE")  # the same size, and with its times put back
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = Hashes(cache)
    assert changed.of(base)["model.safetensors"] == hashlib.sha256(b"BASE").hexdigest() and changed.read == 4


def test_hashes_of_files_that_were_just_written_are_not_kept(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hashes.sqlite"
    for _ in range(2):
        one = Hashes(cache)
        one.of(base)
        assert one.read > 0


@pytest.mark.usefixtures("at_once")
def test_hashes_broken_cache_costs_reading_and_no_more(base: Path, tmp_path: Path) -> None:
    cache, right = tmp_path / "hashes.sqlite", Hashes(None).of(base)
    cache.write_bytes(b"this is no database" * 100)
    assert Hashes(cache).of(base) == right
    cache.unlink()
    Hashes(cache).of(base)
    with sqlite3.connect(cache) as connection:
        connection.execute("UPDATE hashes SET sha256 = x'00'")
    assert Hashes(cache).of(base) == right
    (tmp_path / "file").touch()
    assert Hashes(tmp_path / "file" / "hashes.sqlite").of(base) == right


@pytest.mark.usefixtures("at_once")
def test_hashes_cache_that_grew_too_large_begins_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hashes.sqlite"
    Hashes(cache).of(base)
    monkeypatch.setattr(hashes, "_LARGEST", 10)
    again = Hashes(cache)
    assert again.of(base) and again.read > 0


WRITER = """
import sys
from pathlib import Path
from lora_export.keys import hashes
hashes.SETTLED = -(10**12)
for _ in range(5):
    hashes.Hashes(Path(sys.argv[1])).of_all(sorted(Path(sys.argv[2]).iterdir()))
"""


def test_hashes_many_writers_share_a_cache(tmp_path: Path) -> None:
    places = [adapter(tmp_path / "all" / str(n), str(n).encode()) for n in range(20)]
    cache = tmp_path / "hashes.sqlite"
    words = [sys.executable, "-c", WRITER, str(cache), str(tmp_path / "all")]
    running = [subprocess.Popen(words) for _ in range(3)]
    assert [p.wait(60) for p in running] == [0, 0, 0]
    kept = Hashes(cache)
    found = kept.of_all(places)
    assert kept.read == 0 and len({str(found[p]) for p in places}) == 20


def test_hashes_form_is_the_same_where_only_numbers_differ(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", b"1")
    others = {
        "numbers": adapter(tmp_path / "two", b"2"),
        "config": adapter(tmp_path / "config", b"1", '{"r": 8}'),
        "longer": adapter(tmp_path / "longer", b"11"),
        "header": adapter(tmp_path / "header", b"1"),
        "pickle": adapter(tmp_path / "pickle", b"1"),
        "folder": adapter(tmp_path / "folder", b"1"),
        "link": adapter(tmp_path / "link", b"1"),
    }
    (others["header"] / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]1")
    (others["pickle"] / "value_head.bin").touch()
    (others["folder"] / "extra_states").mkdir()
    (others["link"] / "more.json").symlink_to("adapter_config.json")
    found = Hashes(None).of_all([one, *others.values()])

    def form(place: Path) -> str:
        contents = found[place]
        assert isinstance(contents, Contents)
        return contents.form

    assert [name for name, place in others.items() if form(place) == form(one)] == ["numbers"]


def test_hashes_what_cannot_be_read_says_why_and_stops_no_other(base: Path, tmp_path: Path) -> None:
    names = ("empty", "gone", "outward", "pipe", "broken", "bytes")
    empty, gone, outward, pipe, broken, odd = places = [tmp_path / name for name in names]
    for folder in (empty, outward, pipe, broken, odd):
        folder.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (outward / "config.json").symlink_to("../secret.json")
    os.mkfifo(pipe / "config.json")
    (broken / "config.json").symlink_to("nothing")
    (odd / os.fsdecode(b"\xff.json")).touch()
    found = Hashes(None).of_all([*places, base])
    words = ["the folder is empty", "no such folder", "leads out of the folder", "not a regular file",
             "a link that leads nowhere", "not UTF-8"]  # fmt: skip
    for place, told in zip(places, words, strict=True):
        assert told in str(found[place])
    assert isinstance(found[base], Contents)
    with pytest.raises(InputError, match="no such folder"):
        Hashes(None).of(gone)


def test_hashes_file_that_changes_while_it_is_read_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.file_digest

    def meanwhile(stream: Any, name: str) -> Any:
        found = digest(stream, name)
        with (base / "config.json").open("a") as file:
            file.write(" ")
        time.sleep(0.01)
        return found

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    with pytest.raises(InputError, match="changes while it is read"):
        Hashes(None).of(base)
