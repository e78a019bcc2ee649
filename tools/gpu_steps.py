"""The steps of the GPU suite: what is made, and what is measured with it, the most valuable figures first.

Seconds are what is expected on a GPU with 16 cores; a step that would not fit into what is left of a call is left
out, and the next ones are tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from processes import HERE

Command = Sequence[str | Path]
SIZES = {  # of the demo's model and of the larger one, and the grid of the latter
    "real": ("135M", "1.1B", "paper"),
    "small": ("135M", "0.1B", "quick"),
    "tiny": ("tiny", "tiny", "quick"),
}


@dataclass(frozen=True)
class Made:
    """A folder in the suite's work. commands: for this Python; each writes its output whole, or not at all."""

    name: str
    seconds: float
    commands: Sequence[Command]
    needs: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """A figure. commands: for this Python; they write into the folder of the result, or, with status 3, into the
    same with .failed; extra: what the first command is told as well, for each of these needs that can be made."""

    name: str
    about: str
    seconds: float
    commands: Sequence[Command]
    needs: Sequence[str] = ()
    extra: Mapping[str, Command] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Where things lie and how they are measured. half: fp16, or fp32 on a CPU; seconds: of one measurement."""

    work: Path
    results: Path
    provider: str
    sizes: str
    half: str
    seconds: int

    def at(self, name: str) -> Path:
        places = {"base": "bf16", "lora": "lora", "fp8": "fp8"}
        kind, _, rest = name.partition(" ")
        if kind in ("demo", "large") and rest in places:
            return self.work / "models" / SIZES[self.sizes][kind == "large"] / places[rest]
        return self.work / name.replace(" ", "-")

    def result(self, step: str) -> Path:
        return self.results / step.replace(" ", "-")

    # --- what is made ----------------------------------------------------------------------------------------

    def everything_made(self) -> Mapping[str, Made]:
        rows = [
            *self._decoder("demo", self.half, 25),
            *self._decoder("demo", "int4", 25),
            *self._gptq(),
            *self._fp8(),
        ]
        rows += [*self._decoder("large", self.half, 60), *self._experts(), *self._graphs()]
        return {made.name: made for made in rows}

    def _seeded(self, which: str) -> list[Made]:
        size = SIZES[self.sizes][which == "large"]
        command = (HERE / "random_models.py", self.work / "models", size, "bf16", "lora")
        base, adapter, merged = (self.at(f"{which} {part}") for part in ("base", "lora", "merged"))
        merge = ("-m", "lora_export", "merge", "-b", base, "-a", adapter, "-o", merged, "-q")
        seconds = 40 if which == "large" else 10
        return [
            Made(f"{which} base", seconds, (command,)),
            Made(f"{which} lora", 0, (command,), (f"{which} base",)),
            Made(f"{which} merged", seconds / 2, (merge,), (f"{which} base", f"{which} lora")),
        ]

    def _decoder(self, which: str, precision: str, seconds: float) -> list[Made]:
        """All arms in one precision; the merged model takes the graph of the base."""
        base, adapter = f"{which} base", f"{which} lora"
        plain = f"{which} {precision} base"
        rows = self._seeded(which) if precision == self.half else []
        rows.append(self._export(plain, seconds, precision, (base,), "-m", self.at(base)))
        rows.append(self._reused(f"{which} {precision} merged", seconds / 2, plain, f"{which} merged"))
        words = ("-m", self.at(base), "-a", self.at(adapter), "--unmerged")
        rows.append(self._export(f"{which} {precision} unmerged", seconds, precision, (base, adapter), *words))
        if precision == self.half:
            words = words[:-1]
            rows.append(self._export(f"{which} {precision} plugged", seconds, precision, (base, adapter), *words))
        return rows

    def _export(self, name: str, seconds: float, precision: str, needs: Sequence[str], *words: str | Path) -> Made:
        how = ("--precision", precision, "--provider", self.provider, "-q", "-o", self.at(name))
        return Made(name, seconds, (("-m", "lora_export", "export", *words, *how),), needs)

    def _reused(self, name: str, seconds: float, graph: str, merged: str) -> Made:
        words = ("export", "-m", self.at(merged), "--graph-from", self.at(graph), "-q", "-o", self.at(name))
        return Made(name, seconds, (("-m", "lora_export", *words),), (graph, merged))

    def _gptq(self) -> list[Made]:
        plain = "demo gptq base"
        words = ("-m", self.at("demo base"), "--quantizer", "gptq")
        return [
            self._export(plain, 60, "int4", ("demo base",), *words),
            self._reused("demo gptq merged", 45, plain, "demo merged"),
        ]

    def _fp8(self) -> list[Made]:
        """A base in fp8, merged on the CPU and, where there is one, on the GPU."""
        base, adapter = self.at("demo fp8"), self.at("demo lora")
        size = SIZES[self.sizes][0]
        rows = [
            Made("demo fp8", 10, ((HERE / "random_models.py", self.work / "models", size, "fp8", "lora"),)),
        ]
        for device in ("cpu", "cuda")[: 1 + (self.provider != "cpu")]:
            name = f"fp8 merged on {device}"
            words = ("merge", "-b", base, "-a", adapter, "-o", self.at(name), "--device", device, "-q")
            rows.append(Made(name, 10, (("-m", "lora_export", *words),), ("demo fp8", "demo lora")))
        rows.append(self._reused("fp8 merged graph", 12, f"demo {self.half} base", "fp8 merged on cpu"))
        return rows

    def _experts(self) -> list[Made]:
        folder, merged = self.at("experts"), self.at("experts merged")
        small = () if self.sizes == "real" else ("--small",)
        merge = ("merge", "-b", folder / "base", "-a", folder / "lora", "-o", merged, "-q")
        words = ("-m", folder / "base", "--engine", "genai")
        return [
            Made("experts", 60, ((HERE / "gpu_inputs.py", "experts", folder, *small),)),
            Made("experts merged", 10, (("-m", "lora_export", *merge),), ("experts",)),
            self._export("experts int4 base", 60, "int4", ("experts",), *words),
            self._reused("experts int4 merged", 30, "experts int4 base", "experts merged"),
        ]

    def _graphs(self) -> list[Made]:
        """Graphs that were carried, or are made here; weights from a seed."""
        unet, optimum = self.at("unet graph"), self.at("optimum graph")
        small = () if self.sizes == "real" else ("--small",)
        inputs = HERE / "gpu_inputs.py"
        trace = (inputs, "unet", unet, self.half, "cuda" if self.provider != "cpu" else "cpu", *small)
        theirs = (inputs, "optimum", self.at("demo base"), optimum, self.half)
        rows = [Made("unet graph", 200, (trace,)), Made("optimum graph", 400, (theirs,), ("demo base",))]
        for name, graph, seed in (("unet base", unet, 1), ("unet merged", unet, 2), ("optimum", optimum, 1)):
            command = (inputs, "fill", graph, self.at(name), str(seed))
            rows.append(Made(name, 15, (command,), (graph.name.replace("-", " "),)))
        return rows

    # --- what is measured ------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        half = self.half
        demo = [f"demo {half} {arm}" for arm in ("base", "merged", "unmerged", "plugged")]
        four = [f"demo int4 {arm}" for arm in ("base", "merged", "unmerged")]
        large = [f"large {half} {arm}" for arm in ("base", "merged", "unmerged")]
        grid = ("--grid", SIZES[self.sizes][2])
        steps = [
            self._placement("placement", demo[1]),
            self._latency("merged", f"merged beside base, {half}, batch 1", demo[:2]),
            self._latency("unmerged", "the same beside unmerged and plugged", demo),
            replace(self._latency("optimum", "the same beside Optimum's graph", [*demo[:2], "optimum"]),
                    needs=(*demo[:2], "optimum")),
            self._latency("int4", "int4: base, merged, unmerged", four),
            self._latency("diffusion", "a step of Stable Diffusion 1.5's UNet", ["unet base", "unet merged"],
                          "--batch", "2", "--prompt-length", "64" if self.sizes == "real" else "16"),
            self._latency("qmoe", "experts of gpt-oss in int4 (QMoE)", [f"experts int4 {arm}" for arm in _TWO]),
            self._latency("gptq", "int4 by gptq", ["demo gptq base", "demo gptq merged"]),
            self._latency("fp8", "merged from a base in fp8, beside the base", [demo[0], "fp8 merged graph"]),
        ]  # fmt: skip
        if self.provider != "cpu":
            steps += [self._devices(), self._tests()]
        return [*steps, self._latency("large", "the larger model", large, *grid, times=3)]

    def _placement(self, name: str, graph: str) -> Step:
        file = self.result(name) / "result.json"
        command = (HERE / "gpu_inputs.py", "placement", self.at(graph) / "model.onnx", self.provider, file)
        return Step(name, "who runs each node of the demo's merged graph", 20, (command,), (graph,))

    def _latency(self, name: str, about: str, arms: Sequence[str], *more: str, times: int = 1) -> Step:
        base, merged, *others = arms
        words: list[str | Path] = ["-b", self._graph(base), "-m", self._graph(merged)]
        extra: dict[str, Command] = {}
        for other in others:
            arm = other.rpartition(" ")[2]
            flags = {"unmerged": ("-u", self._graph(other)), "plugged": ("--plugged", self._graph(other))}
            extra[other] = flags.get(arm, ("--beside", f"{arm}={self._graph(other)}"))
        words += more or ("--batch", "1", "--prompt-length", "128")
        seconds = times * self.seconds
        words += ["--provider", self.provider, "--max-time", f"{seconds}s", "-q", "-o", self.result(name)]
        return Step(name, about, seconds + 25, (("-m", "lora_export", "benchmark", *words),), (base, merged), extra)

    def _graph(self, name: str) -> Path:
        return self.at(name) / "model.onnx" if name.startswith(("unet", "optimum")) else self.at(name)

    def _devices(self) -> Step:
        """The two ways to compute a merge give the same numbers."""
        places = [self.at(f"fp8 merged on {device}") for device in ("cpu", "cuda")]
        command = (HERE / "gpu_inputs.py", "compare", *places, self.result("devices") / "result.json")
        about = "a merge on the GPU beside one on the CPU"
        return Step("devices", about, 10, (command,), ("fp8 merged on cpu", "fp8 merged on cuda"))

    def _tests(self) -> Step:
        report = self.result("tests") / "result.xml"
        words = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}")
        files = [HERE.parent / "tests" / name for name in TESTS]
        return Step("tests", "the tests that need a GPU", 90, ((*words, *files),))


_TWO = ("base", "merged")
TESTS = ("benchmarking/test_benchmark_gpu.py", "merging/test_execution.py")  # the files with the marker gpu
