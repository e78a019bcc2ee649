"""Blocks, threads and memory: how the work is cut changes no byte."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.adapters.updates import rebuilt
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import InputError, RuntimeUnavailable
from lora_export.merging import merge, peak_rss, plan
from lora_export.merging.running import tensor as work
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.layout import write_shards
from lora_export.merging.running.rows import moved
from lora_export.progress import Silent
from lora_export.storage import workers
from tests.builders import handmade_adapter, handmade_base, tensors
from tests.matrix.families import FAMILIES
from tests.matrix.test_matrix import RUNNING, train

SHAPES = {
    "m.proj.weight": (2_500, 1_100),
    "m.up.weight": (301, 96),
    "m.norm.weight": (96,),
    "big.weight": (900, 800),
}
NAME = "model.safetensors"


@pytest.fixture
def inputs(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, list[AdapterChoice]]:
    base = handmade_base(tmp_path / "base", SHAPES, dtype)
    generator = torch.Generator().manual_seed(3)
    matrices = {
        f"m.{n}": (torch.randn(7, columns, generator=generator), torch.randn(rows, 7, generator=generator))
        for n, rows, columns in (("proj", 2_500, 1_100), ("up", 301, 96))
    }
    return base, [AdapterChoice(handmade_adapter(tmp_path / "adapter", matrices))]


def executed(base: Path, choices: list[AdapterChoice], folder: Path, workers: int, **options: Any) -> Auditor:
    folder.mkdir()
    return write_shards(plan(base, choices, MergeOptions(**options)), folder, Silent(), workers=workers)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("memory", [2**20, 2**31])
def test_execution_result_does_not_depend_on_threads_or_memory(
    tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]], workers: int, memory: int
) -> None:
    """On some processors a product of few rows adds up in another order, which may turn a rounding."""
    merge(*inputs, tmp_path / "expected")
    run = executed(*inputs, tmp_path / "out", workers, max_memory=memory)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    for name, value in expected.items():
        other = value != found[name]
        assert int(other.sum()) <= (1e-4 * other.numel() if memory == 2**20 else 0)
        assert torch.allclose(value[other].float(), found[name][other].float(), rtol=2**-7, atol=1e-6)
    again = executed(*inputs, tmp_path / "again", workers, max_memory=memory)
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "again" / NAME).read_bytes()
    assert run.records == again.records
    assert {r.name: r.operation for r in run.records} == {
        n: "updated" if n in ("m.proj.weight", "m.up.weight") else "copied" for n in SHAPES
    }


def test_execution_blocks_cover_every_row_once(
    tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = work.TensorWork.compute

    def watch(self: work.TensorWork, start: int, stop: int) -> torch.Tensor:
        if self.tensor.output.name == "m.proj.weight":
            seen.append((start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(work.TensorWork, "compute", watch)
    executed(*inputs, tmp_path / "out", 2, max_memory=2**20)
    blocks = sorted(seen)
    assert len(blocks) > 50
    assert max((b - a) * 1_100 * 4 for a, b in blocks) * 2 * 6 <= 2**20
    assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])] and blocks[-1][1] == 2_500


def test_execution_memory_below_a_row_is_refused_before_first_byte(
    tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]]
) -> None:
    with pytest.raises(InputError, match="merging this tensor takes") as refusal:
        executed(*inputs, tmp_path / "out", 2, max_memory=2_000)
    assert refusal.value.tensor == "m.proj.weight" and "--max-memory 1MiB" in str(refusal.value)
    assert not list((tmp_path / "out").iterdir())


def test_budget_holds_with_many_threads() -> None:
    budget, used, most = workers.Budget(10), 0, 0
    lock = threading.Lock()

    def take(cost: int) -> None:
        nonlocal used, most
        for _ in range(40):
            with budget.holding(cost):
                with lock:
                    used += cost
                    most = max(most, used)
                time.sleep(0.0001)
                with lock:
                    used -= cost

    threads = [threading.Thread(target=take, args=(cost,)) for cost in (1, 3, 4, 6, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 6 <= most <= 10 and used == 0


def test_execution_error_in_one_thread_ends_all(
    tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(workers, "write_at", fail)
    with pytest.raises(OSError, match="Input/output error"):
        merge(*inputs, tmp_path / "out", MergeOptions(max_memory=2**20))
    assert calls <= 4
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


def test_execution_restores_torch_threads(tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]]) -> None:
    torch.set_num_threads(2)
    try:
        merge(*inputs, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_survival_without_change_in_sample_reads_every_row(tmp_path: Path) -> None:
    """Only one row of a large weight changes, and it is none of those that are looked at first."""
    base = handmade_base(tmp_path / "base", {"m.proj.weight": (600, 1_000)})
    b = torch.zeros(600, 2)
    b[101] = 1.0
    adapter = handmade_adapter(tmp_path / "adapter", {"m.proj": (torch.randn(2, 1_000), b)})
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert result.delta_survival == pytest.approx(1.0)
    assert [w for w in result.warnings if "the base is a part of" not in w] == []
    changed = (tensors(base)["m.proj.weight"] != tensors(tmp_path / "out")["m.proj.weight"]).any(1)
    assert changed.nonzero().flatten().tolist() == [101]


# Kinds that ask their numbers which rows they are for, which meta cannot answer.
ASKING = {"miss bat", "shira", "supertuning", "supertuning supra", "waveft", "waveft plain", "waveft sym3"}


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in RUNNING}))
def test_update_computes_on_device_of_weight(kind: str, tmp_path: Path) -> None:
    """On the meta device, which refuses a tensor that was left behind on the CPU as CUDA does."""
    family = FAMILIES[next(name for of, name in RUNNING if of == kind)]
    base = family.save(tmp_path / "base")
    train(base, family, kind, tmp_path / "adapter")
    computed = 0
    for tensor in plan(base, [AdapterChoice(tmp_path / "adapter")], MergeOptions()).tensors.values():
        weight = torch.empty(tensor.shape, device="meta")
        for update in tensor.updates:
            there, parts = moved(update.load(tensor.shape), "meta"), list[Any]()
            rebuilt(there, parts.append)
            devices = {part.device.type for part in parts if isinstance(part, torch.Tensor)}
            assert devices == {"meta"} or (not devices and kind not in ASKING)
            if kind not in ASKING:
                weight = there.apply(weight, slice(0, len(weight)))
            computed += 1
        assert weight.device.type == "meta" and weight.shape == tensor.shape
    assert computed


def test_execution_on_missing_cuda_is_refused(
    tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match="finds no CUDA device"):
        merge(*inputs, tmp_path / "out", MergeOptions(device="cuda"))
    assert not (tmp_path / "out").exists()


def test_execution_on_a_played_cuda_moves_every_block(
    tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU plays the card: the way of each block to it and back."""
    moved, to = list[object](), torch.Tensor.to

    def played(self: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        moved.extend(w for w in where if w == "cuda")
        return to(self, *("cpu" if w == "cuda" else w for w in where), **how)

    merge(*inputs, tmp_path / "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", played)
    merge(*inputs, tmp_path / "cuda", MergeOptions(device="cuda"))
    assert moved
    cpu, cuda = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    assert cpu.keys() == cuda.keys() and all(torch.equal(cpu[name], cuda[name]) for name in cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_execution_on_cuda_matches_cpu(tmp_path: Path, inputs: tuple[Path, list[AdapterChoice]]) -> None:
    """The sums are taken in another order: one unit in the last place of fp32 before the one rounding."""
    merge(*inputs, tmp_path / "cpu")
    merge(*inputs, tmp_path / "cuda", MergeOptions(device="cuda"))
    cpu, cuda = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    for name, value in cpu.items():
        equal = float((value == cuda[name]).double().mean())
        assert equal >= 0.999, name
        torch.testing.assert_close(cuda[name].float(), value.float(), rtol=2.0**-7, atol=1e-6)


def test_peak_memory_is_of_this_process() -> None:
    """Linux counts what the parent had at the fork into ru_maxrss; tests have torch loaded, the child has not."""
    command = "from lora_export.merging import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert 2**23 < int(done.stdout) < 150 * 2**20 < peak_rss()
