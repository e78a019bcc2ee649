"""The arms of a study, opened: a session for each graph, and the memory that each of them takes."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lora_export import runtime
from lora_export.benchmarking import environment
from lora_export.benchmarking.buffers import Buffers
from lora_export.benchmarking.cells import AGAIN, BASE, DELAY, DELAYED, MERGED, PLUGGED, UNMERGED, CellSpec
from lora_export.benchmarking.gpus import Gpus
from lora_export.benchmarking.sessions import ArmSession, Bound, OpenedArm, delayed
from lora_export.contracts import BenchmarkArm
from lora_export.errors import RuntimeUnavailable

_ESSENTIAL = (BASE, MERGED)
_COPIES = (BASE, MERGED, AGAIN)
_TWINS = {BASE: AGAIN, AGAIN: BASE}
_ROOM = 3  # times the size of a graph that must be free before it is loaded a second time


@dataclass
class OpenedArms:
    """Opened arms by name. one_base: there was memory for one session of the base only, which stands for both;
    copies: base and merged are one graph, and are checked, not tested; unmeasured: a session that is open and not
    timed; memory: arm → the most bytes that loading and running it took.
    """

    provider: str
    threads: int
    cuda_graph: bool
    note: Callable[[str], None]
    detail: Callable[[str], None]
    gpus: Gpus
    copies: bool = False
    opened: dict[str, OpenedArm] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    one_base: bool = False
    unmeasured: OpenedArm | None = None

    def open(self, arms: Mapping[str, BenchmarkArm], part: int) -> bool:
        """Open the graph number `part` of every arm. False if CUDA graphs are asked for and base or merged cannot
        be captured, which is no failure."""
        sessions = len(_COPIES) if self.copies else 1
        room = self.provider == "cpu" and BASE in arms and self._fits_again(arms[BASE].graphs[part], sessions)
        if room and self.copies:
            self._open_copies(arms, part)
        elif room:
            # On a CPU the first session that a process opens has been seen to be slower by 5 to 10 % for as long as
            # it is open. None of the arms should be that one.
            self.unmeasured = self._open(arms[BASE], part)
        for name, arm in arms.items():
            if name in self.opened:
                continue
            if arm.in_pytorch and self.cuda_graph:
                continue  # ONNX Runtime's CUDA graphs are not PyTorch's
            twin = _TWINS.get(name, "")
            if twin in self.opened and not self._fits_again(arm.graphs[part]):
                self.note("memory holds only one session of the base: the noise floor compares it with itself")
                self.opened[name], self.one_base = self.opened[twin], True
                continue
            self.detail(f"loading {name}" + (" for CUDA graphs" if self.cuda_graph else ""))
            before, _ = environment.memory(self.provider, self.gpus)
            try:
                self.opened[name] = self._open(arm, part)
            except RuntimeUnavailable as error:
                if not self.cuda_graph:
                    raise
                self.note(f"no CUDA graph of {name}: {first_line(error)}")
                if name in (*_ESSENTIAL, AGAIN):
                    return False
                continue
            self.memory[name] = max(0, environment.memory(self.provider, self.gpus)[0] - before)
        return True

    def _open_copies(self, arms: Mapping[str, BenchmarkArm], part: int) -> None:
        """Open the sessions of one graph at the same time, each of which takes the same memory."""
        self.detail(f"loading {', '.join(_COPIES)}")
        before, _ = environment.memory(self.provider, self.gpus)
        with ThreadPoolExecutor(len(_COPIES)) as pool:
            self.opened |= dict(
                zip(_COPIES, pool.map(lambda name: self._open(arms[name], part), _COPIES), strict=True)
            )
        grown = environment.memory(self.provider, self.gpus)[0] - before
        self.memory |= dict.fromkeys(_COPIES, max(0, grown) // len(_COPIES))

    @property
    def is_decoder(self) -> bool:
        return self.opened[MERGED].is_decoder

    @property
    def is_denoiser(self) -> bool:
        return self.opened[MERGED].is_denoiser

    def bind(self, spec: CellSpec, graph_id: int, seed: int, margin: float) -> dict[str, Bound]:
        """What is timed in a cell. Arms that cannot be captured are left out with a note; so may be merged
        itself."""
        buffers = Buffers(self.opened[MERGED].device)
        bound: dict[str, Bound] = {}
        for name, arm in self.opened.items():
            twin = _TWINS.get(name, "")
            if self.one_base and twin in bound:
                bound[name] = bound[twin]  # the same session needs the same captured graph
                continue
            before, own = environment.memory(self.provider, self.gpus)[0], buffers.nbytes
            try:
                call = arm.call(spec.shape, buffers, graph_id, seed)
                call.run()  # the capture run
            except Exception as error:
                if not spec.cuda_graph:
                    raise
                self.note(f"{spec.key}: no CUDA graph of {name}: {first_line(error)}")
                continue
            bound[name] = call
            grown = environment.memory(self.provider, self.gpus)[0] - before - (buffers.nbytes - own)
            self.memory[name] = self.memory.get(name, 0) + max(0, grown)
        if BASE in bound and not bound.keys() & {UNMERGED, PLUGGED}:
            bound[DELAYED] = Bound(delayed(bound[BASE].run, DELAY * margin), bound[BASE].kv_in_place)
        return bound

    def _open(self, arm: BenchmarkArm, part: int) -> OpenedArm:
        if arm.pytorch:
            from lora_export.benchmarking.pytorch import TorchSession

            return TorchSession(*arm.pytorch, self.provider, self.threads)
        if arm.forward:
            from lora_export.benchmarking.pytorch import TorchStep

            return TorchStep(arm.forward, arm.graphs[part], self.provider, self.threads)
        model = arm.graphs[part]
        opened = ArmSession(model, self.provider, self.threads, adapter=arm.adapter, cuda_graph=self.cuda_graph)
        wanted, providers = runtime.PROVIDERS[self.provider], opened.session.get_providers()
        if self.provider == "cpu" and providers != [wanted]:
            raise RuntimeUnavailable(
                f"the session runs on {', '.join(providers)}",
                where=model,
                expected=wanted,
                next_step="lora-export env",
            )
        return opened

    def _fits_again(self, model: Path, times: int = 1) -> bool:
        """Whether there is memory for `times` sessions of it, and room besides."""
        size = sum(p.stat().st_size for p in model.parent.glob(f"{model.name}*"))
        return environment.memory(self.provider, self.gpus)[1] > (_ROOM + times - 1) * size


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
