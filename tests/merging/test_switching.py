"""Switched folders are fresh merges byte for byte, whatever came before, and whenever the switch is killed."""

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lora_export.commands.main import cli
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError, InputError, OutputError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.storage import disk, files, sealed
from lora_export.storage.workers import OpenFile
from lora_export.workflows import switching
from lora_export.workflows.switching import Switched, switch
from tests.builders import llama_config, lora, save_adapter, save_base
from tests.daily import later

TARGETS = (["q_proj", "down_proj"], ["q_proj", "v_proj"], ["o_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switching")
    return save_base(folder / "base", dtype=torch.bfloat16, max_shard_size="12KB")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    return [
        save_adapter(base.parent / name, base, lora(3 + i, target_modules=TARGETS[i]), seed=50 + i, scale=0.05)
        for i, name in enumerate("ABC")
    ]


@pytest.fixture(scope="module")
def fresh(base: Path, adapters: list[Path]) -> Callable[..., Path]:
    """A merge of one of the adapters, made once."""

    def make(which: int, **options: Any) -> Path:
        out = base.parent / "-".join(["fresh", str(which), *(str(v) for v in options.values())])
        if not out.exists():
            merge(base, [AdapterChoice(adapters[which])], out, MergeOptions(**options))
        return out

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def to(folder: Path, base: Path, before: Path, after: Path, **more: Any) -> Switched:
    return switch(folder, base, [AdapterChoice(before)], [AdapterChoice(after)], Silent(), **more)


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_switch_ten_times_equals_fresh_merge(
    base: Path, adapters: list[Path], fresh: Any, tmp_path: Path, dtype: str
) -> None:
    folder = Path(shutil.copytree(fresh(0, dtype=dtype), tmp_path / "merged"))
    order = [0, 1, 2, 0, 2, 1, 0, 1, 1, 2, 0]
    for before, after in itertools.pairwise(order):
        to(folder, base, adapters[before], adapters[after])
        assert contents(folder) == contents(fresh(after, dtype=dtype))
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_switch_reports_changed_tensors(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    made = to(folder, base, adapters[0], adapters[1])
    assert (made.kind, made.tensors) == ("merged", 6)  # q, v and down of two layers
    assert made.nbytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_switch_several_weighted_adapters_equals_fresh_merge(
    base: Path, adapters: list[Path], fresh: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    both = [AdapterChoice(adapters[1], 0.5), AdapterChoice(adapters[2], -1.0)]
    switch(folder, base, [AdapterChoice(adapters[0])], both, Silent())
    merge(base, both, tmp_path / "fresh")
    assert contents(folder) == contents(tmp_path / "fresh")
    switch(folder, base, both, [AdapterChoice(adapters[0])], Silent())
    assert contents(folder) == contents(fresh(0))


def test_switch_leaves_similar_folders_alone(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    """Earlier versions kept one under a fixed name; a link of that name had a folder elsewhere emptied."""
    folder, outside = Path(shutil.copytree(fresh(0), tmp_path / "in" / "merged")), tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("of the user")
    (tmp_path / "in" / ".merged.spare").symlink_to(outside)
    to(folder, base, adapters[0], adapters[1])
    assert contents(folder) == contents(fresh(1)) and not folder.is_symlink()
    assert contents(outside) == {"mine": b"of the user"}


def test_switch_restores_changed_weights(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    """Neither of the folder in use nor of an earlier one, whatever their times say."""
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    for step, (before, after) in enumerate([(0, 1), (1, 0)]):
        for shard in folder.glob("*.safetensors"):
            times = shard.stat()
            with shard.open("r+b") as f:
                f.seek(-64, os.SEEK_END)
                f.write(bytes(64))
            os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        to(folder, base, adapters[before], adapters[after])
        assert contents(folder) == contents(fresh(after)), step


def test_switch_keeps_open_files_readable(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    """A server that mapped the folder two switches ago must not see its weights change."""
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    shards = sorted(folder.glob("*.safetensors"))
    before = {s.name: s.read_bytes() for s in shards}
    opened = {s.name: s.open("rb") for s in shards}
    to(folder, base, adapters[0], adapters[1])
    to(folder, base, adapters[1], adapters[2])
    for name, file in opened.items():
        assert file.read() == before[name]
        file.close()


def test_switch_gives_descriptor_loader_one_adapter(
    base: Path, adapters: list[Path], fresh: Any, tmp_path: Path
) -> None:
    """It reads shard by shard in the folder that it has opened: all of one adapter, or an error."""
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    names = sorted(s.name for s in folder.glob("*.safetensors"))
    states = [[(fresh(n) / name).read_bytes() for name in names] for n in (0, 1)]
    outcomes = []
    for at in range(len(names) + 1):
        found, now = [], at % 2
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for i, name in enumerate(names):
                if i == at:
                    to(folder, base, adapters[now], adapters[1 - now])
                shard = os.open(name, os.O_RDONLY, dir_fd=fd)
                found.append(os.read(shard, 10**6))
                os.close(shard)
            outcomes.append("whole")
        except FileNotFoundError:
            outcomes.append("gone")
        os.close(fd)
        assert found == states[now][: len(found)], at
        if at == len(names):
            break
    assert set(outcomes) == {"whole", "gone"}


# --- killed in the middle -----------------------------------------------------------------------------------


class Countdown:
    """Kills this process, as SIGKILL would, at the n-th write, sync or rename."""

    def __init__(self, left: int) -> None:
        self.left, self._lock = left, threading.Lock()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            with self._lock:
                self.left -= 1
                if self.left == 0:
                    os._exit(9)
            return function(*arguments, **more)

        return counted


def killed_at(count: int, work: Callable[[], Any]) -> bool:
    """Whether a child that does `work` was killed before it was done."""
    child = os.fork()
    if child == 0:
        countdown = Countdown(count)
        OpenFile.write = countdown(OpenFile.write)  # type: ignore[method-assign]
        disk.sync, disk.exchange_names = countdown(disk.sync), countdown(disk.exchange_names)
        sealed.copy, files.replace_folder = countdown(sealed.copy), countdown(files.replace_folder)
        files._remove_replaced = countdown(files._remove_replaced)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


@pytest.mark.parametrize("steps", [later(1), 3])
def test_switch_killed_anywhere_leaves_old_or_new_state(
    base: Path, adapters: list[Path], fresh: Any, tmp_path: Path, steps: int
) -> None:
    old, new = contents(fresh(0)), contents(fresh(2))
    seen, kills, count = set[str](), 0, 1
    while True:
        home = tmp_path / str(count)
        folder = Path(shutil.copytree(fresh(0), home / "merged"))
        was_killed = killed_at(count, lambda at=folder: to(at, base, adapters[0], adapters[2]))  # type: ignore[misc]
        found = contents(folder)
        assert found in (old, new), f"mixed after {count}"
        seen.add("new" if found == new else "old")
        if found == old:  # whatever was left behind, the next one goes through, and cleans it up
            to(folder, base, adapters[0], adapters[2])
            assert contents(folder) == new
        else:
            to(folder, base, adapters[2], adapters[0])
            assert contents(folder) == old
        assert [p.name for p in home.iterdir()] == ["merged"]
        if not was_killed:
            break
        kills, count = kills + 1, count + steps
        shutil.rmtree(home)
    assert kills * steps >= 30 and seen == {"old", "new"}


def test_switch_error_keeps_old_state(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_export.merging.write_beside", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to(folder, base, adapters[0], adapters[1])
    assert contents(folder) == contents(fresh(0))
    to(folder, base, adapters[0], adapters[1])
    assert contents(folder) == contents(fresh(1))


# --- refusals -----------------------------------------------------------------------------------------------


def test_switch_from_other_adapter_is_refused(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    with pytest.raises(InputError, match="not merged from the adapters of --from"):
        to(folder, base, adapters[1], adapters[2])
    with pytest.raises(InputError, match="not merged from the adapters of --from"):
        switch(folder, base, [AdapterChoice(adapters[0], 0.5)], [AdapterChoice(adapters[1])], Silent())
    with pytest.raises(InputError, match="neither a merged folder nor an export"):
        to(base, base, adapters[0], adapters[1])
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_switch_part_of_run_is_refused(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    shutil.copytree(fresh(0), tmp_path / "run" / "merged")
    (tmp_path / "run" / "report").mkdir()
    for name in ("manifest.json", "report/report.json"):
        (tmp_path / "run" / name).write_text("{}")
    for folder in (tmp_path / "run", tmp_path / "run" / "merged"):
        with pytest.raises(InputError, match="part of a run") as refused:
            to(folder, base, adapters[0], adapters[1])
        assert f"cp -r {tmp_path / 'run' / 'merged'} COPY" in str(refused.value.next_step)


def test_switch_with_other_base_is_refused(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", dtype=torch.bfloat16, max_shard_size="12KB", seed=8)
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    with pytest.raises(CheckpointError, match="not the one that the folder was merged from"):
        to(folder, other, adapters[0], adapters[1])
    assert contents(folder) == contents(fresh(0))


def test_switch_of_other_layout_is_refused(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    tied = save_base(tmp_path / "tied", config=llama_config(tied=True))
    plain = save_adapter(tmp_path / "plain", tied, lora(target_modules=["q_proj"]))
    head = save_adapter(tmp_path / "head", tied, lora(target_modules=["lm_head"]), save_embeddings=False)
    merge(tied, [AdapterChoice(plain)], tmp_path / "merged")
    with pytest.raises(InputError, match="folders of different layout"):
        to(tmp_path / "merged", tied, plain, head)


def test_switch_concurrently_is_refused(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    with files.added_to(folder), pytest.raises(OutputError, match="is writing this output"):
        to(folder, base, adapters[0], adapters[1])
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(OutputError, match="file or a link"):
        to(link, base, adapters[0], adapters[1])


def test_switch_command_reports_result(base: Path, adapters: list[Path], fresh: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fresh(0), tmp_path / "merged"))
    command = ["switch", "-m", str(folder), "--from", str(adapters[0]), "--to", str(adapters[1])]
    done = CliRunner().invoke(cli, [*command, "-b", str(base), "--json", "-q"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["kind"] == "merged" and document["tensors"] == 6
    assert contents(folder) == contents(fresh(1))
    again = CliRunner().invoke(cli, [*command, "-b", str(base)])
    assert again.exit_code == 1 and "--from" in again.stderr
    nowhere = tmp_path / "nowhere"
    shutil.copytree(adapters[0], nowhere)
    config = json.loads((nowhere / "adapter_config.json").read_text())
    (nowhere / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not name its base"):
        switching.base_of(nowhere)
    assert switching.base_of(adapters[0]) == str(base)
