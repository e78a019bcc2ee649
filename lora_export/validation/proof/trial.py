"""One run of a graph and what PyTorch computes for it, and both sides of such runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lora_export.errors import LoraExportError
from lora_export.graph_runs.runs import GraphRun
from lora_export.graph_runs.signature import Array, Signature
from lora_export.graph_runs.taken_apart import take_apart

Expected = Mapping[str, torch.Tensor]
_PRESENT = ("present", "past")
_ACCURACY, _FP32 = "accuracy_level", 1
EXACT = ".exact.onnx"
_PACKED = ("GroupQueryAttention",)  # rows are packed to the left: it takes padding on the right only


@dataclass(frozen=True)
class Trial:
    """case: in words; graph: its file; feed: what it was given; expected, found: outputs by name; failure: why
    the graph gave nothing; limit: a difference here is a limit of the graph's operators, which is recorded, and no
    fault of the graph; before: other graphs whose outputs it read, and what they were given."""

    case: str
    graph: str
    feed: Mapping[str, Any]
    expected: Expected
    found: Mapping[str, Array]
    failure: str = ""
    limit: bool = False
    before: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class Extent:
    """How much is tried. full: many sizes instead of some; far: all of it, or only what lies beyond the borders of
    the configuration, on a model of the first layers; streamed: whether each call of PyTorch reads all weights."""

    full: bool = False
    far_only: bool = False
    streamed: bool = False


class Graphs:
    """The graphs of an export in sessions that are opened when they are needed. provider: cpu or cuda; taken_apart:
    how many operators of CUDA alone were replaced."""

    def __init__(self, folder: Path, names: Sequence[str], provider: str) -> None:
        self.folder, self.names, self.provider = folder, tuple(names), provider
        self._runs: dict[str, GraphRun] = {}
        self.taken_apart = 0

    @property
    def _small(self) -> bool:
        """Whether memory has room for a copy of the weights beside the reference."""
        size = sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())
        return size < psutil.virtual_memory().available // 4

    def signature(self, name: str) -> Signature:
        return self._run(name).signature

    def open(self) -> None:
        """Open all sessions now. One that cannot be opened says so when it is run."""
        for name in self.names:
            with contextlib.suppress(Exception):
                self._run(name)

    def run(self, name: str, feed: Mapping[str, Any]) -> tuple[dict[str, Array], str]:
        """All outputs, or none and the reason."""
        try:
            run = self._run(name)
            given = {n: fitting(feed[n], v.dtype) for n, v in run.signature.inputs.items() if n in feed}
            return run.arrays(given), ""
        except LoraExportError as error:
            return {}, error.found
        except Exception as error:  # ONNX Runtime's exceptions share no base but this one
            return {}, " ".join(str(error).split())

    def packs_rows(self, name: str) -> bool:
        """Whether the graph's attention takes padding on the right only, and several rows one token at a time."""
        import onnx_ir as ir

        nodes = ir.load(self.folder / name).graph.all_nodes()
        return any(n.op_type in _PACKED and (len(n.inputs) < 11 or n.inputs[10] is None) for n in nodes)

    def _run(self, name: str) -> GraphRun:
        if name not in self._runs:
            with self._exact(self.folder / name) as path:
                self._runs[name] = GraphRun(path, self.provider, packed=self._small)
        return self._runs[name]

    @contextlib.contextmanager
    def _exact(self, graph: Path) -> Iterator[Path]:
        """The graph, or a copy whose quantized products read their inputs as they are.

        MatMulNBits may round them to 8 bits first, which hides what else a graph does; how is the operator's
        business. Operators that CUDA alone has are taken apart for the CPU.
        """
        import onnx_ir as ir

        model = ir.load(graph)
        rounding = [n for n in model.graph.all_nodes() if n.attributes.get_int(_ACCURACY, 0) > _FP32]
        for node in rounding:
            node.attributes[_ACCURACY] = ir.AttrInt64(_ACCURACY, 0)
        apart = take_apart(model) if self.provider == "cpu" else 0
        self.taken_apart += apart
        if not rounding and not apart:
            yield graph
            return
        path = graph.with_name(EXACT)
        try:
            ir.save(model, path)
            yield path
        finally:
            path.unlink(missing_ok=True)


def fitting(value: Any, dtype: Any) -> Array:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return np.ascontiguousarray(array).reshape(array.shape).astype(dtype, copy=False)  # it makes a row of a number


@dataclass(eq=False)
class Reference:
    """The model of transformers. seed: of what is made up; watch: the context of each call, each step of a sequence
    then being a call of its own; visited: chosen experts, by the path of the module that holds them."""

    model: Any
    seed: int = 0
    watch: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None
    visited: dict[str, set[int]] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, of: Any = None, **given: Any) -> Any:
        """The outputs of the model, or of one of its modules, for these inputs."""
        module = self.model if of is None else of
        given = {n: self._cast(v) for n, v in given.items()}
        with torch.no_grad(), self.watch(self.model) if self.watch else contextlib.nullcontext():
            return module(**given)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value

    @contextlib.contextmanager
    def counting_experts(self) -> Iterator[None]:
        """Inside, the experts that are chosen are noted."""
        with contextlib.ExitStack() as stack:
            for path, module in self.model.named_modules():
                if expert_count(module):
                    self.visited.setdefault(path, set())
                    hook = module.register_forward_pre_hook(self._note(path), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    def _note(self, path: str) -> Callable[[Any, Any, Any], None]:
        def note(_: Any, args: Any, kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and not value.is_floating_point():
                    self.visited[path] |= set(value.flatten().tolist())

        return note


def expert_count(module: Any) -> int:
    """How many experts a module holds that its inputs choose among; 0 for any other module."""
    count = getattr(module, "num_experts", 0)
    return int(count) if type(module).__name__.endswith("Experts") and isinstance(count, int) else 0


def outputs_of(signature: Signature) -> list[str]:
    """The outputs that are no states for the next step."""
    return [name for name in signature.outputs if not name.startswith(_PRESENT)]


def counted(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros where the mask says that a position is padding: what stands there is nobody's business."""
    if mask is None or values.shape[: mask.dim()] != mask.shape:
        return values
    keep = mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())).bool()
    return torch.where(keep, values, torch.zeros((), dtype=values.dtype))


def counted_array(values: Array, mask: torch.Tensor | None) -> Array:
    if mask is None or values.shape[: mask.dim()] != tuple(mask.shape):
        return values
    keep = mask.numpy().astype(bool).reshape(*mask.shape, *[1] * (values.ndim - mask.dim()))
    return np.where(keep, values, np.zeros((), values.dtype))
