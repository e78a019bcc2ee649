"""A folder for onnxruntime-genai: graph, configurations for CPU and CUDA, tokenizer, chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from lora_export.errors import InputError
from lora_export.escape import markdown
from lora_export.packages import companions, genai_vision, graphs
from lora_export.packages.interpreters import Python
from lora_export.packages.job import (
    ADAPTER_SUFFIX,
    RUNS_OWN,
    PackageFacts,
    PackageJob,
    PackageTarget,
    Run,
    Snippet,
    Variant,
)
from lora_export.packages.programs import TOKENS, prompt_of
from lora_export.storage import sealed

CONFIG = "genai_config.json"
_WHEELS = {"cpu": "onnxruntime-genai", "cuda": "onnxruntime-genai-cuda"}
PROVIDERS: Mapping[str, list[dict[str, Any]]] = {"cpu": [], "cuda": [{"cuda": {"enable_cuda_graph": "0"}}]}
# Fields of generation_config.json that genai's `search` has under the same name.
_SEARCH = (
    "do_sample", "diversity_penalty", "early_stopping", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beams", "num_return_sequences", "repetition_penalty", "temperature", "top_k",
    "top_p",
)  # fmt: skip


class GenaiTarget(PackageTarget):
    name: ClassVar[str] = "genai"
    title: ClassVar[str] = "onnxruntime-genai"
    takes_adapters: ClassVar[bool] = True

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        if genai_vision.is_one(run.export):
            genai_vision.check(run)
        elif not (run.export.output / CONFIG).is_file():
            raise InputError(
                f"the run was exported by the {run.export.engine} engine without a {CONFIG}",
                where=run.folder,
                expected="an export that onnxruntime-genai runs: a decoder's or Whisper's by the genai engine",
                next_step="--for optimum, or --for transformers-js",
            )
        return super().variants(run, names)

    def lay(self, job: PackageJob) -> None:
        export = job.exports[RUNS_OWN]
        companions.lay(job.run, job.stage)
        if genai_vision.is_one(export):
            self._configure(job, genai_vision.lay(job.run, export, job.stage))
            return
        for path in export.paths:
            graphs.save(ir.load(path), job.stage / path.name, f"{path.name}.data", largest=2**62)
        for name in job.facts.adapters:
            sealed.copy(export.output / f"{name}{ADAPTER_SUFFIX}", job.stage / f"{name}{ADAPTER_SUFFIX}")
        extra = export.output / "audio_processor_config.json"
        if extra.is_file():
            sealed.copy(extra, job.stage / extra.name)
        self._configure(job, sealed.read_json(export.output / CONFIG))

    def _configure(self, job: PackageJob, made: Mapping[str, Any]) -> None:
        for name in job.facts.providers:
            config = configured(made, job.run, name)
            file = CONFIG if name == job.facts.providers[0] else f"genai_config.{name}.json"
            sealed.write_json(job.stage / file, config)

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        build, prompt = (_TEXT, prompt_of(facts)) if facts.task.input == "text" else (_SPEECH, _begun(facts))
        if facts.task.sees_and_writes:
            picture = genai_vision.PICTURE[str(facts.config["model_type"])]
            build, prompt = _PICTURE, picture + prompt_of(facts)
        plug, active = "", ""
        if facts.adapters:
            name = repr(facts.adapters[0])
            file = repr(f"{folder}/{facts.adapters[0]}{ADAPTER_SUFFIX}")
            plug = f"\nadapters = og.Adapters(model)\nadapters.load({file}, {name})"
            active = f"\ngenerator.set_active_adapter(adapters, {name})"
        code = build.format(folder=folder, prompt=repr(prompt), tokens=TOKENS, plug=plug, active=active)
        return Snippet(Python(), f"pip install {_WHEELS[facts.providers[0]]}", code)

    def check_folder(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            raise InputError(
                f"the package has no {CONFIG}",
                where=folder,
                expected=f"{CONFIG}; without it onnxruntime-genai reads manifest.json as its own",
            )

    def notes(self, facts: PackageFacts) -> str:
        words = {"text": _BATCHES, "audio": _SPOKEN if _is_multilingual(facts) else ""}.get(facts.task.input, "")
        if facts.adapters[1:]:
            names = ", ".join(f"`{markdown(n)}`" for n in facts.adapters[1:])
            words += f"The package also has the adapters {names}: load and activate them in the same way.\n\n"
        other = next(iter(facts.providers[1:]), None)
        if other is None:
            return words
        return words + (
            f"On {other.upper()} (`pip install {_WHEELS[other]}`), insert this between the configuration and "
            f'the model:\n\n```python\nconfig.overlay(open("genai_config.{other}.json").read())\n```\n'
        )


TARGET = GenaiTarget()

_BATCHES = (
    "Texts of one batch are padded on the right, as by `tokenizer.encode_batch`. A model with convolutions or "
    "other states takes texts of equal length.\n\n"
)

_SPOKEN = "`<|en|>` is the language of the sound: put its own code there, such as `<|de|>`.\n\n"
_ENGLISH_ALONE = 51_864  # tokens of Whisper's English models, whose prompts name no language and no task

_TEXT = """import json
import onnxruntime_genai as og
config = og.Config({folder!r})
model = og.Model(config){plug}
tokenizer = og.Tokenizer(model)
prompt = tokenizer.encode({prompt})
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + {tokens}, do_sample=False)
generator = og.Generator(model, params){active}
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(tokenizer.decode(generator.get_sequence(0)[len(prompt):])))"""

_SPEECH = """import io, json, wave
import onnxruntime_genai as og
sound = io.BytesIO()
with wave.open(sound, "wb") as out:
    out.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
    out.writeframes(bytes(32000))
config = og.Config({folder!r})
model = og.Model(config)
processor = model.create_multimodal_processor()
params = og.GeneratorParams(model)
params.set_search_options(max_length={tokens}, do_sample=False, num_beams=1)
generator = og.Generator(model, params)
audios = og.Audios.open_bytes(sound.getvalue())
generator.set_inputs(processor([{prompt}], audios=audios))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(processor.decode(generator.get_sequence(0))))"""


_PICTURE = """import io, json
import onnxruntime_genai as og
from PIL import Image
picture = io.BytesIO()
Image.new("RGB", (224, 224)).save(picture, "PNG")
config = og.Config({folder!r})
model = og.Model(config)
processor = model.create_multimodal_processor()
inputs = processor({prompt}, images=og.Images.open_bytes(picture.getvalue()))
params = og.GeneratorParams(model)
params.set_search_options(max_length=inputs["input_ids"].shape()[1] + {tokens}, do_sample=False)
generator = og.Generator(model, params)
generator.set_inputs(inputs)
start = generator.token_count()
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(processor.decode(generator.get_sequence(0)[start:])))"""


def _is_multilingual(facts: PackageFacts) -> bool:
    size = facts.config.get("vocab_size")
    return isinstance(size, int) and size > _ENGLISH_ALONE


def _begun(facts: PackageFacts) -> str:
    """The tokens that Whisper's text begins with; genai adds none by itself."""
    spoken = "<|en|><|transcribe|>" if _is_multilingual(facts) else ""
    return f"<|startoftranscript|>{spoken}<|notimestamps|>"


def configured(config: Mapping[str, Any], run: Run, provider: str) -> dict[str, Any]:
    """genai_config.json for a provider, with the search defaults of generation_config.json."""
    model = {
        key: part | {"session_options": part["session_options"] | {"provider_options": PROVIDERS[provider]}}
        if isinstance(part, dict) and "session_options" in part
        else part
        for key, part in config["model"].items()
    }
    path = run.companions / "generation_config.json"
    generation = sealed.read_json(path) if path.is_file() else {}
    search = {k: generation[k] for k in _SEARCH if generation.get(k) is not None}
    if "early_stopping" in search:  # "never", of transformers, is not a value of genai's
        search["early_stopping"] = search["early_stopping"] is True
    search["max_length"] = min(int(search.get("max_length") or 2**31), int(config["model"]["context_length"]))
    ends = generation.get("eos_token_id")
    if ends is not None and run.task.input != "audio":
        model["eos_token_id"] = ends
    return {**config, "model": model, "search": {**config["search"], **search}}
