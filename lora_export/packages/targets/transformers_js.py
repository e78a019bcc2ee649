"""A folder for transformers.js: onnx/model_q4.onnx and so on, with data files that config.json counts."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from lora_export.contracts import Progress
from lora_export.errors import ExportError, InputError
from lora_export.packages import browsers, companions
from lora_export.packages.graphs import LARGEST_CHUNK
from lora_export.packages.job import PackageFacts, PackageJob, PackageTarget, Run, Snippet, Variant
from lora_export.packages.programs import javascript_program, web_page
from lora_export.packages.targets import hub_graphs
from lora_export.storage import sealed

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
# q4f16 stores 4 bits and computes in fp16, as exports for CUDA do.
_PRECISIONS = {
    "fp32": Variant("fp32", "fp32"),
    "fp16": Variant("fp16", "fp16"),
    "q8": Variant("q8", "int8"),
    "q4": Variant("q4", "int4"),
    "q4f16": Variant("q4f16", "int4", provider="cuda"),
}
_FP16_INT4 = ("q4f16",)  # of engines whose int4 graphs for CUDA compute in fp16; others' compute in fp32
USUAL = ("fp32", "q8", "q4")  # the default of Node, that of browsers, and the smallest for both
_MOST_CHUNKS = 100
_FOLDER = "model"  # of a page
_SETUP = "npm install --prefix .. @huggingface/transformers"


class TransformersJsTarget(PackageTarget):
    name: ClassVar[str] = "transformers-js"
    title: ClassVar[str] = "transformers.js"
    needs_merged: ClassVar[bool] = True

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        unknown = next((n for n in names if n not in (*_PRECISIONS, "all")), None)
        if unknown:
            raise InputError(f"--variant {unknown}", expected=", ".join((*_PRECISIONS, "all")))
        made = [n for n in _PRECISIONS if n not in _FP16_INT4 or run.fp16_int4]
        lacking = next((n for n in names if n != "all" and n not in made), None)
        if lacking:
            raise InputError(
                f"--variant {lacking} of a model that the {run.export.engine} engine exports",
                expected=", ".join(made),
                next_step="--variant q4, or fp16",
            )
        if run.task.input in ("text", "both") and not companions.has_fast_tokenizer(run):
            raise InputError(
                "the run has no tokenizer.json, which transformers.js reads, and its tokenizer cannot be converted",
                where=run.companions,
                next_step="--for optimum",
            )
        wanted = made if "all" in names else names or USUAL
        return tuple(_PRECISIONS[n] for n in made if n in wanted)

    def lay(self, job: PackageJob) -> None:
        folder = job.stage / "onnx"
        folder.mkdir()
        chunks: dict[str, int] = {}
        for name, export in job.exports.items():
            adapt = partial(_adapt, job.progress, name)
            chunks |= hub_graphs.lay(export, folder, SUFFIXES[name], LARGEST_CHUNK, adapt)
        many = next((n for n, count in chunks.items() if count > _MOST_CHUNKS), None)
        if many:
            raise ExportError(
                f"{many} has {chunks[many]} data files",
                expected=f"at most {_MOST_CHUNKS}, the most that transformers.js reads",
                next_step="--variant q4",
            )
        given = job.run.config.get("transformers.js_config")
        settings = dict(given) if isinstance(given, dict) else {}
        settings["use_external_data_format"] = {name: count for name, count in chunks.items() if count}
        halved = [n for n in job.exports if n.endswith("f16") or n == "fp16"]
        if halved and job.run.task.generates:
            settings["kv_cache_dtype"] = dict.fromkeys(
                halved, "float16"
            )  # transformers.js 3 needs it, 4 looks at the graph
        companions.lay(job.run, job.stage, {**_flat(job.run.config), "transformers.js_config": settings})
        _lay_image_processor(job.stage)

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        return javascript_program(facts, folder, facts.variants[0], _SETUP)

    def notes(self, facts: PackageFacts) -> str:
        words = ", ".join(f'"{v}"' for v in facts.variants)
        return (
            f"The variants are {words}. Without a dtype, transformers.js takes fp32 on Node and on WebGPU, and q8 "
            "on WASM. fp16 and q4f16 need a graphics card that computes in fp16.\n\n"
            "In a browser, on WebGPU or else on WASM: save this page beside this folder, which it calls "
            f"`{_FOLDER}`, and beside node_modules, and serve the three.\n\n"
            f"```html\n{web_page(facts, _FOLDER, facts.variants[0])}```\n"
        )


def _adapt(progress: Progress, variant: str, model: ir.Model) -> None:
    """Make a graph run in browsers as well, or warn that it does not."""
    browsers.adapt(model)
    left = list(browsers.remaining(model))
    if left:
        progress.warn(f"{variant} runs on Node only: browsers have no operator for {left[0]}")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the language model that transformers.js looks for at the top of this kind's config.json."""
    text = config.get("text_config")
    if config.get("model_type") != "qwen2_vl" or not isinstance(text, dict):
        return {}
    return {k: v for k, v in text.items() if k.startswith(("num_", "hidden_size")) and k not in config}


def _lay_image_processor(stage: Path) -> None:
    """preprocessor_config.json, where transformers 5 has put the image processor into processor_config.json."""
    whole, own = stage / "processor_config.json", stage / "preprocessor_config.json"
    if own.is_file() or not whole.is_file():
        return
    settings = sealed.read_json(whole)
    if isinstance(settings.get("image_processor"), dict):
        named = {k: settings[k] for k in ("processor_class",) if k in settings}
        sealed.write_settings(own, {**settings["image_processor"], **named})


TARGET = TransformersJsTarget()
