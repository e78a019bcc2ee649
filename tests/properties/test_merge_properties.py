"""What holds for any shapes, ranks, weights and shard sizes."""

import json
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.checkpoint.header import build_header, read_header
from lora_export.checkpoint.shards import OutputTensor, plan_shards
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.merging import merge
from tests.builders import handmade_adapter, handmade_base, tensors

NAMES = st.text(alphabet='ab.é"\\ 0_', min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), SHAPES), max_size=8))
def test_header_round_trips(entries: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    header = build_header([(n, d, s) for n, (d, s) in entries.items()], {"format": "pt"})
    size = sum(math.prod(s) * {"F32": 4, "BF16": 2, "U8": 1, "I64": 8}[d] for d, s in entries.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(header + bytes(size))
        found = read_header(path)
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == entries
    assert found.metadata == {"format": "pt"}


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30), limit=st.integers(1, 120))
def test_shards_hold_every_tensor_once_within_limit(sizes: list[int], limit: int) -> None:
    planned = [OutputTensor(str(i), "U8", (n,), "home") for i, n in enumerate(sizes)]
    shards = plan_shards(planned, limit, {})
    assert [t for s in shards for t in s.tensors] == planned
    assert all(len(s.tensors) == 1 or sum(t.nbytes for t in s.tensors) <= limit for s in shards)
    assert len({s.file for s in shards}) == len(shards)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 8),
    alpha=st.floats(0.5, 64),
    rslora=st.booleans(),
    flip=st.booleans(),
    share=st.floats(-2, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_low_rank_update_is_rounded_once(
    rows: int, columns: int, rank: int, alpha: float, rslora: bool, flip: bool, share: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    shape = (columns, rows) if flip else (rows, columns)
    with tempfile.TemporaryDirectory() as folder:
        model_type = "gpt2" if flip else "llama"
        base = handmade_base(Path(folder, "base"), {"m.c_proj.weight": shape}, dtype, model_type=model_type)
        adapter = handmade_adapter(Path(folder, "adapter"), {"m.c_proj": (a, b)}, alpha=alpha, use_rslora=rslora)
        merge(base, [AdapterChoice(adapter, share)], Path(folder, "out"), MergeOptions())
        before = tensors(base)["m.c_proj.weight"].double()
        after = tensors(Path(folder, "out"))["m.c_proj.weight"]
    s = share * alpha / (math.sqrt(rank) if rslora else rank)
    delta, size = b.double() @ a.double(), b.double().abs() @ a.double().abs()
    exact = before + s * (delta.T if flip else delta)
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    smallest = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    bound = half_ulp * exact.abs() + smallest + 2.0**-21 * (before.abs() + abs(s) * (size.T if flip else size))
    assert after.dtype == dtype
    assert bool(((after.double() - exact).abs() <= bound).all())


def test_adapters_merge_in_any_order(tmp_path: Path) -> None:
    base = handmade_base(tmp_path / "base", {"m.proj.weight": (30, 20)})
    choices = [
        AdapterChoice(
            handmade_adapter(tmp_path / name, {"m.proj": (torch.randn(rank, 20), torch.randn(30, rank))}), weight
        )
        for name, rank, weight in (("A", 3, 0.7), ("B", 5, 0.3), ("C", 1, -1.0))
    ]
    merge(base, choices, tmp_path / "one")
    merge(base, choices[::-1], tmp_path / "two")
    one, two = tensors(tmp_path / "one")["m.proj.weight"], tensors(tmp_path / "two")["m.proj.weight"]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    certificate = json.loads((tmp_path / "one" / "lora_export_certificate.json").read_text())
    assert certificate["records"][0]["kinds"] == ["lora"] * 3
