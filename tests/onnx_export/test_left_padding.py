"""Batches whose rows are padded on the left, as by transformers, and on the right, as by onnxruntime-genai."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lora_export.contracts import ExportResult
from tests.export_matrix import configurations
from tests.onnx_export import runs
from tests.onnx_export.conftest import VOCABULARY

LENGTHS, PROMPT, STEPS = (14, 9, 4), 14, 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_padded_on_either_side_equal_each_row_alone(
    side: str, exported: Callable[..., ExportResult], llama: Path
) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama)
    session = runs.session(exported(llama).model)
    texts = [
        torch.randint(4, VOCABULARY, (n + STEPS,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS
    ]
    with torch.no_grad():
        alone = [model(t[None]).logits[0].numpy() for t in texts]
    mask = np.array([_padded([1] * n, 0, side) for n in LENGTHS])
    ids = np.array([_padded(t[:n].tolist(), 3, side) for t, n in zip(texts, LENGTHS, strict=True)])
    past = configurations.empty_cache(session, len(texts))
    for step in range(STEPS + 1):
        found = configurations.run(session, {"input_ids": ids, "attention_mask": mask, **past})
        for row, (n, wanted) in enumerate(zip(LENGTHS, alone, strict=True)):
            kept = found["logits"][row][mask[row, -ids.shape[1] :].astype(bool)]
            expected = wanted[:n] if step == 0 else wanted[n + step - 1 : n + step]
            assert np.abs(kept - expected).max() <= 1e-4 * np.abs(wanted).max()
        past = configurations.grown_cache(found)
        if step < STEPS:
            ids = np.array([[int(t[n + step])] for t, n in zip(texts, LENGTHS, strict=True)])
            mask = np.concatenate([mask, np.ones((len(texts), 1), np.int64)], 1)


def test_turned_rows_need_no_copy_from_the_memory_of_the_cpu(
    exported: Callable[..., ExportResult], llama: Path
) -> None:
    """What is computed of shapes stays on the CPU: only bounds of slices, which kernels read there, may need it."""
    graph = ir.load(exported(llama).model).graph
    own = {n.name: n for n in graph if str(n.name).startswith("/model/left_padding/")}
    of_shapes = [n for n in own.values() if n.op_type == "Shape"]
    readers = []
    while of_shapes:
        uses = [(u.node, u.idx) for v in of_shapes.pop().outputs for u in v.uses()]
        of_shapes += [node for node, _ in uses if node.op_type == "Neg"]
        readers += [(node.op_type, at) for node, at in uses if node.op_type != "Neg"]
    assert len(own) > 10
    assert readers == [("Slice", 1)]


def _padded(row: list[int], with_: int, side: str) -> list[int]:
    padding = [with_] * (PROMPT - len(row))
    return padding + row if side == "left" else row + padding
