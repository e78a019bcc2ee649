"""GGUF files of the merged model, as llama.cpp, Ollama and what is built on them read it, and a Modelfile.

Tokenizer and chat template lie in the GGUF file. The files themselves are made by llama.cpp's converter, which is
run in a process of its own before the package is laid out.
"""

from collections.abc import Sequence
from typing import ClassVar

from lora_export.errors import ExportError, InputError
from lora_export.packages import gguf
from lora_export.packages.companions import for_both
from lora_export.packages.gguf import modelfile, programs
from lora_export.packages.job import PackageFacts, PackageJob, PackageTarget, Run, Snippet, Variant
from lora_export.packages.programs import TOKENS
from lora_export.packages.readme import licence_of
from lora_export.storage import sealed

_TASKS = ("text-generation", "feature-extraction")


class GgufTarget(PackageTarget):
    name: ClassVar[str] = "gguf"
    title: ClassVar[str] = "llama.cpp and Ollama"
    needs_merged: ClassVar[bool] = True
    file_names: ClassVar[tuple[str, ...]] = ("*.gguf", modelfile.NAME)
    own_options: ClassVar[tuple[str, ...]] = ("converter", "adapter")
    relative: ClassVar[float] = 5e-3  # llama.cpp looks GELU up in a table of its tanh approximation, in fp16

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        if run.task.name not in _TASKS:
            raise ExportError(
                f"GGUF of a model for {run.task.name}",
                where=run.folder,
                expected="a model that continues text, or embeds it: llama.cpp's server and Ollama run no other "
                "from the file that its converter writes",
                next_step="--for optimum, transformers-js or hf",
            )
        return ()

    def types(self, run: Run, names: Sequence[str]) -> tuple[str, ...]:
        unknown = next((n for n in names if n not in gguf.TYPES), None)
        if unknown is not None:
            raise InputError(
                f"--variant {unknown} with --for gguf",
                expected=", ".join(gguf.TYPES),
                next_step="for the K-quants make f16 or f32, and then: llama-quantize NAME-F16.gguf "
                "NAME-Q4_K_M.gguf Q4_K_M",
            )
        wanted = names or [gguf.OF_DTYPE.get(run.merge.dtype, "f16")]
        return tuple(t for t in gguf.TYPES if t in wanted)

    def lay(self, job: PackageJob) -> None:
        facts = job.facts
        sealed.write_settings(job.stage / "config.json", for_both(job.run.config))
        licence = licence_of(job.run, job.options.licence)
        file = gguf.model_file(facts.name, facts.variants[0])
        text = modelfile.text(file, job.run.companions, licence)
        (job.stage / modelfile.NAME).write_text(text, encoding="utf-8")

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        return programs.program(facts, folder)

    def notes(self, facts: PackageFacts) -> str:
        first = gguf.model_file(facts.name, facts.variants[0])
        lines = ["The same by llama.cpp's own programs, and by Ollama:", "", "```bash"]
        if facts.task.generates:
            lines += [
                f"llama-completion -m {first} -no-cnv --temp 0 -n {TOKENS} -p 'The capital of France is'",
                f"llama-cli -m {first}    # a chat",
                f"llama-server -m {first}",
                f"ollama create {facts.name.lower()} -f {modelfile.NAME}",
            ]
        else:
            lines += [f"llama-server -m {first} --embedding"]
        lines += ["```", "", _OTHER_TYPES.format(first=first, smaller=gguf.model_file(facts.name, "Q4_K_M"))]
        return "\n".join(lines + (["", _lora(facts)] if facts.lora else []))


_OTHER_TYPES = (
    "llama.cpp keeps keys and values in fp16 unless told otherwise (`-ctk f32 -ctv f32 -fa off`), "
    "so its answer may differ from the one above. A smaller file: `llama-quantize {first} {smaller} Q4_K_M`."
)


def _lora(facts: PackageFacts) -> str:
    file = gguf.lora_file(facts.name)
    return (
        f"`{file}` is the adapter alone, for a GGUF file of the base: `llama-server -m BASE.gguf --lora {file}`. "
        "Use one or the other: on the merged model it would act twice."
    )


TARGET = GgufTarget()
