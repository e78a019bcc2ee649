"""A model in MLflow's format: MLmodel, the code that it names, graphs, tokenizer, environments, an example.

MLflow is not needed to write it, and needs nothing of this project to run it.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lora_export.allowed import mlflow_model
from lora_export.errors import ExportError, InputError
from lora_export.graph_runs.signature import Signature
from lora_export.packages import companions, graphs
from lora_export.packages.interpreters import Python
from lora_export.packages.job import RUNS_OWN, PackageFacts, PackageJob, PackageTarget, Run, Snippet, Variant
from lora_export.packages.mlflow import documents, reading
from lora_export.packages.programs import NUMBERS, TOKENS, prompt_of
from lora_export.packages.targets import hub_graphs

_SERVED = Path(__file__).parents[1] / "mlflow" / "served"
_READ = frozenset(
    {
        "input_ids", "attention_mask", "position_ids", "token_type_ids", "encoder_hidden_states",
        "encoder_attention_mask", "use_cache_branch",
    }
)  # fmt: skip


class MlflowTarget(PackageTarget):
    name: ClassVar[str] = "mlflow"
    title: ClassVar[str] = "MLflow"
    file_names: ClassVar[tuple[str, ...]] = mlflow_model.FILES

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        if not run.task.draws and run.task.name not in mlflow_model.TASKS:
            raise InputError(
                f"--for mlflow with a model of the task {run.task.name}",
                where=run.folder,
                expected=f"text alone: {', '.join(mlflow_model.TASKS)}",
                next_step="--for triton, whose client gets the outputs of the graph",
            )
        if run.export.precision == "bf16":
            raise InputError(
                "--for mlflow with a graph in bf16, whose logits numpy cannot read",
                where=run.folder,
                expected="fp32, fp16, or a quantized graph",
                next_step="merge-and-export --precision fp16",
            )
        reading.check_tokenizer(run)
        if run.task.name == "text-generation":
            reading.check_template(run)
        return super().variants(run, names)

    def lay(self, job: PackageJob) -> None:
        companions.lay(job.run, job.stage)
        models = hub_graphs.models(job.exports[RUNS_OWN])
        for name, model in models.items():
            _refuse_strange_inputs(Signature.of_model(model), name)
        outputs = [str(v.name) for model in models.values() for v in model.graph.outputs]
        for name, model in models.items():
            graphs.save(model, job.stage / f"{name}.onnx", f"{name}.onnx.data", largest=2**62)
        config = {
            "longest": reading.longest(job.run),
            "providers": documents.PROVIDERS[job.facts.providers[0]],
            "task": job.facts.task.name,
        }
        single = len(models) == 1 and _is_plain(job.stage / "model.onnx")
        signature = documents.signature(job.facts.task.name, outputs, reading.has_template(job.run))
        documents.write(job, module(), config, signature, single)

    def code(self, facts: PackageFacts) -> Mapping[str, str]:
        return {f"{mlflow_model.CODE}/{module()}/{name}": text for name, text in _served().items()}

    def check_folder(self, folder: Path) -> None:
        path = folder / mlflow_model.NAME
        if not path.is_file():
            raise InputError(f"the package has no {path.name}", where=folder, expected=f"{path.name}, for MLflow")
        loader = mlflow_model.read_yaml(path)["flavors"]["python_function"]["loader_module"]
        if loader != module():
            raise InputError(f"{path.name} loads {loader}", where=path, expected=f"{module()}, which lies in code/")

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        code = f"import json, mlflow\nmodel = mlflow.pyfunc.load_model({folder!r})\n{_question(facts)}"
        return Snippet(Python(), f"pip install -r {mlflow_model.REQUIREMENTS}", code)

    def check(self, facts: PackageFacts, folder: str) -> Snippet:
        """MLflow loads the folder where it is installed, and the code of this version is imported before that of
        the package could be."""
        providers = documents.PROVIDERS[facts.providers[0]]
        config = {"longest": 2**31 - 1, "providers": providers, "task": facts.task.name}
        given = {"files": json.dumps(_served()), "module": module(), "folder": folder, "config": config}
        return Snippet(Python(), "", _CHECK.format(**given, question=_question(facts)))

    def notes(self, facts: PackageFacts) -> str:
        prompt = prompt_of(facts)
        sent = {"prompt": prompt, "max_tokens": TOKENS} if facts.task.generates else {"input": [prompt]}
        body = json.dumps(sent).replace("'", "\\u0027")
        return _NOTES.format(body=body)


TARGET = MlflowTarget()

_CHECK = """import json, pathlib, sys, tempfile
home = tempfile.TemporaryDirectory()
place = pathlib.Path(home.name, {module!r})
place.mkdir()
for name, text in json.loads({files!r}).items():
    (place / name).write_text(text, encoding="utf-8")
sys.path.insert(0, home.name)
import {module} as served
try:
    import mlflow
except ImportError:
    model = served._load_pyfunc({folder!r}, {config!r})
else:
    model = mlflow.pyfunc.load_model({folder!r})
{question}"""

_NOTES = """MLflow serves it, in an environment of its own if `--env-manager local` is left out:

```bash
mlflow models serve -m . --env-manager local -p 5000
curl -s localhost:5000/invocations -H 'Content-Type: application/json' -d '{body}'
```

It can be registered as it is (`mlflow.register_model("file:///…", "NAME")`), and made into an image
(`mlflow models build-docker -m . -n NAME`). Python leaves `__pycache__` beside code that it imports, which
`lora-export verify` then finds: verify first, or set `PYTHONDONTWRITEBYTECODE=1`.
"""


def _question(facts: PackageFacts) -> str:
    """The lines that print the answer to the sample."""
    prompt = prompt_of(facts)
    if facts.task.generates:
        sent = f"[{{'prompt': {prompt!r}}}], params={{'max_tokens': {TOKENS}}}"
        return f"print(json.dumps(model.predict({sent})[0]))"
    first = f"next(iter(model.get_raw_model().outputs({prompt!r}).values()))"
    return f"print(json.dumps({first}.flatten()[:{NUMBERS}].tolist()))"


@functools.cache
def _served() -> Mapping[str, str]:
    """The code of the package: name → text."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(_SERVED.glob("*.py"))}


@functools.cache
def module() -> str:
    """The name of the code. It has a part of its hash, as a process may load packages of several versions."""
    digest = hashlib.sha256(json.dumps(_served()).encode()).hexdigest()
    return f"{mlflow_model.MODULE}{digest[:8]}"


def _is_plain(path: Path) -> bool:
    """Whether onnx.checker, which mlflow.onnx asks first, accepts a graph as it lies there."""
    from onnx.checker import ValidationError, check_model

    try:
        check_model(str(path))
    except (ValidationError, ValueError):
        return False
    return True


def _refuse_strange_inputs(signature: Signature, name: str) -> None:
    """ExportError for a graph that reads what the code does not make."""
    cache = set(signature.cache)
    strange = [n for n in signature.inputs if n not in _READ | cache]
    if strange:
        raise ExportError(
            f"the graph {name}.onnx reads {', '.join(strange)}, which the code for MLflow does not make",
            expected=f"{', '.join(sorted(_READ))}, and a cache",
            next_step="--for genai or --for triton",
        )
