"""The arms without ONNX: PEFT's unmerged model, run by PyTorch the way its users run it."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_export.benchmarking.buffers import Buffers, Shape
from lora_export.benchmarking.sessions import Bound
from lora_export.errors import InputError
from lora_export.graph_runs.denoiser import step_feed
from lora_export.graph_runs.feeds import tokens
from lora_export.graph_runs.signature import Signature
from lora_export.patterns import bounded


class TorchSession:
    """A causal language model with its adapter unmerged, in the type that its config names, without gradients.

    base, adapter: folders. threads: of PyTorch's own pool, which is the process's. provider: as for a session; cuda
    for anything but cpu.
    """

    is_decoder, is_denoiser = True, False

    def __init__(self, base: Path, adapter: Path, provider: str, threads: int) -> None:
        import torch
        import transformers
        from peft import PeftModel

        self.device = "cpu" if provider == "cpu" else "cuda"
        torch.set_num_threads(threads)
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
            with bounded("peft", str(adapter)):
                unmerged = PeftModel.from_pretrained(model, adapter)
            self._model = unmerged.eval().requires_grad_(False).to(self.device)
        except (ValueError, OSError, KeyError) as error:
            raise InputError(
                f"PyTorch and PEFT cannot load this pair: {' '.join(str(error).split())[:300]}",
                where=adapter,
                expected="a causal language model and a PEFT adapter of it",
                next_step="the same command without the arm pytorch",
            ) from error

    def call(self, shape: Shape, buffers: Buffers, graph_id: int = 1, seed: int = 0) -> Bound:
        """Bind `shape`; after a step, its keys and values are cut off again, outside of the time."""
        import torch

        ids = torch.from_numpy(tokens(shape.batch, shape.tokens, seed)).to(self.device)
        cache = self._filled(shape, seed) if shape.past else None

        def call() -> float:
            start = time.perf_counter_ns()
            with torch.inference_mode():
                self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            self._synchronize()
            ms = (time.perf_counter_ns() - start) / 1e6
            if cache is not None:
                cache.crop(-shape.tokens)
            return ms

        return Bound(call, disturbs=True)

    def _filled(self, shape: Shape, seed: int) -> Any:
        import torch

        prompt = torch.from_numpy(tokens(shape.batch, shape.past, seed)).to(self.device)
        with torch.inference_mode():
            return self._model(input_ids=prompt, use_cache=True).past_key_values

    @property
    def _synchronize(self) -> Callable[[], None]:
        return _synchronizer(self.device)


class TorchStep:
    """A denoiser under PyTorch, given what `graph` reads. load: as `forward` of BenchmarkArm."""

    is_decoder, is_denoiser = False, True

    def __init__(
        self,
        load: Callable[[str], Callable[[Mapping[str, Any]], object]],
        graph: Path,
        provider: str,
        threads: int,
    ) -> None:
        import onnx_ir
        import torch

        self.device = "cpu" if provider == "cpu" else "cuda"
        torch.set_num_threads(threads)
        self._signature = Signature.of_model(onnx_ir.load(graph), graph)
        self._forward = load(self.device)

    def call(self, shape: Shape, buffers: Buffers, graph_id: int = 1, seed: int = 0) -> Bound:
        import torch

        feed = step_feed(self._signature, shape.batch, shape.tokens, seed)
        given = {name: torch.from_numpy(array).to(self.device) for name, array in feed.items()}
        synchronize = _synchronizer(self.device)

        def call() -> float:
            start = time.perf_counter_ns()
            with torch.inference_mode():
                self._forward(given)
            synchronize()
            return (time.perf_counter_ns() - start) / 1e6

        return Bound(call, disturbs=True)


def _synchronizer(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None
