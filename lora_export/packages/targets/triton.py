"""A model repository for the Triton Inference Server: NAME/config.pbtxt and NAME/1/model.onnx/model.onnx.

The server takes every folder in it for a model, and starts only if it can serve them all.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from lora_export.allowed import triton_config
from lora_export.errors import InputError
from lora_export.packages import companions, graphs
from lora_export.packages.interpreters import Python
from lora_export.packages.job import RUNS_OWN, PackageFacts, PackageJob, PackageTarget, Run, Snippet, Variant
from lora_export.packages.targets import hub_graphs
from lora_export.packages.triton import clients, config, writing
from lora_export.storage import sealed

_IMAGE = "nvcr.io/nvidia/tritonserver:26.09-py3"
_SERVED = "lora_export.packages.triton.served"
_MODEL_CODE, _SESSION_CODE = "1/model.py", "1/onnx_session.py"


class TritonTarget(PackageTarget):
    name: ClassVar[str] = "triton"
    title: ClassVar[str] = "the Triton Inference Server"
    own_options: ClassVar[tuple[str, ...]] = ("backend",)

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        config.classes()
        return super().variants(run, names)

    def lay(self, job: PackageJob) -> None:
        export, facts = job.exports[RUNS_OWN], job.facts
        models = hub_graphs.models(export)
        if facts.backend == config.PYTHON:
            _refuse_for_python(facts, models)
        companions.lay(job.run, job.stage, modules=False)
        for part, model in models.items():
            encoded = config.always_encoded(models)
            _lay_graph(job, clients.model_name(facts.name, part), model, encoded)
        if writing.is_offered(facts):
            generation = job.run.companions / "generation_config.json"
            settings = sealed.read_json(generation) if generation.is_file() else {}
            writing.lay(job, models["model"], settings)

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        setup = "pip install 'tritonclient[grpc]' transformers  # after starting the server, see below"
        return Snippet(Python(), setup, clients.program(facts, folder, clients.SERVER))

    def check(self, facts: PackageFacts, folder: str) -> Snippet:
        """The same program with ONNX Runtime instead of the server, on the file that the server would load."""
        session = clients.SESSION.format(folder=folder)
        return Snippet(Python(), "", clients.program(facts, folder, session))

    def code(self, facts: PackageFacts) -> Mapping[str, str]:
        if facts.backend != config.PYTHON:
            return {}
        models = {clients.model_name(facts.name, part): "graph.py" for part in clients.parts(facts.task)}
        if writing.is_offered(facts):
            models[facts.name + writing.SUFFIX] = "generate.py"
        files = {f"{model}/{_MODEL_CODE}": _served(file) for model, file in models.items()}
        return files | {f"{model}/{_SESSION_CODE}": _served("onnx_session.py") for model in models}

    def check_folder(self, folder: Path) -> None:
        """InputError for a folder in the root that the server would refuse to start with."""
        for path in sorted(p for p in folder.iterdir() if p.is_dir()):
            _check_model(path)

    def notes(self, facts: PackageFacts) -> str:
        on_python = facts.backend == config.PYTHON
        words = f"Start the server first, in this folder:\n\n```bash\n{_start(facts)}\n```\n\n"
        if on_python:
            words += (
                "The models run in the server's Python backend. Its Python needs the packages that are installed "
                f"here: `pip install {_wheels(facts)}`. Some servers, 2.51 among them, lose arrays of numpy 2: "
                "outputs arrive empty. Mount the folder read-only, as here: Python would write its caches into "
                "it.\n\n"
            )
        if writing.is_offered(facts):
            return words + clients.TEXT_NOTES.format(name=facts.name + writing.SUFFIX)
        return words + (
            "The server takes token ids: the tokenizer runs in the client, as above. To move it into the server, "
            "put the same call into a model of Triton's Python backend, and join the two in an ensemble.\n"
        )


TARGET = TritonTarget()


def _served(file: str) -> str:
    return resources.files(_SERVED).joinpath(file).read_text(encoding="utf-8")


def _refuse_for_python(facts: PackageFacts, models: Mapping[str, ir.Model]) -> None:
    """InputError for graphs that the Python backend cannot be given."""
    instead = "--backend onnxruntime"
    if facts.precision == "bf16":
        raise InputError(
            "a bf16 graph with --backend python",
            expected="fp32, fp16 or int4: numpy, which that backend passes tensors by, has no bf16",
            next_step=instead,
        )
    if {*models} != {*clients.parts(facts.task)}:
        raise InputError(
            f"--backend python for the graphs {', '.join(models)}",
            expected=" and ".join(clients.parts(facts.task)),
            next_step=instead,
        )


def _lay_graph(job: PackageJob, name: str, model: ir.Model, encoded: int | None) -> None:
    version = job.stage / name / "1" / "model.onnx"
    version.mkdir(parents=True)
    graphs.save(model, version / "model.onnx", "model.onnx.data", largest=2**62)
    backend = job.facts.backend or "onnxruntime"
    made, warm = config.configured(name, model, job.facts.providers[0], backend, encoded)
    (job.stage / name / "config.pbtxt").write_text(config.as_text(made), encoding="utf-8")
    for file, value in warm.items():
        (job.stage / name / "warmup").mkdir(exist_ok=True)
        (job.stage / name / "warmup" / file).write_bytes(value.tobytes())


def _check_model(folder: Path) -> None:
    path = folder / triton_config.NAME
    if not path.is_file():
        raise InputError(
            f"{folder.name}/ is not a model: it has no {path.name}, so the server would not start",
            where=folder,
            expected="models alone among the folders of the package",
        )
    named, backend = triton_config.check_config(path)
    if named != folder.name:
        raise InputError(f"{path.name} is that of the model {named!r}", where=path, expected=folder.name)
    program, graph = folder / _MODEL_CODE, folder / "1" / "model.onnx" / "model.onnx"
    needed = program if backend == config.PYTHON else graph
    if not needed.is_file():
        raise InputError(
            f"{folder.name} has no {needed.relative_to(folder).as_posix()}, which its backend {backend} loads",
            where=path,
            expected="the model that config.pbtxt describes",
        )


def _start(facts: PackageFacts) -> str:
    gpus = "--gpus all " if facts.providers[0] == "cuda" else ""
    mount = f'-v "$PWD":/models:ro {_IMAGE}'
    server = "tritonserver --model-repository=/models"
    if facts.backend != config.PYTHON:
        return f"docker run --rm {gpus}-p 8001:8001 {mount} \\\n  {server}"
    ports = "-p 8000:8000 -p 8001:8001"
    install = f"pip install {_wheels(facts)} && {server}"
    return f'docker run --rm {gpus}--shm-size=1g {ports} {mount} \\\n  bash -c "{install}"'


def _wheels(facts: PackageFacts) -> str:
    """What the programs import, for the server's Python."""
    return f"onnxruntime{'-gpu' * (facts.providers[0] == 'cuda')} tokenizers 'numpy<2'"
