"""What is this pipeline, or this single-file adapter? Answered from headers and configuration files alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.adapters.diffusion.outside import Seen, look_at, that_matters
from lora_export.adapters.diffusion.vectors import Vectors
from lora_export.adapters.kind import AdapterFile
from lora_export.checkpoint.adapter_files import open_single_file
from lora_export.checkpoint.pipeline import is_pipeline, open_component, open_pipeline
from lora_export.checkpoint.weight_files import variants_in
from lora_export.contracts import AdapterChoice, Component, MergeOptions
from lora_export.errors import LoraExportError
from lora_export.quantization import describe, method_here, settings_of, with_settings
from lora_export.workflows.parameters import parameters, parameters_of_base

CERTIFICATE = "lora_export_certificate.json"
# Of a component's config.json, what decides which adapters and pictures fit it.
_TOLD = (
    "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim",
    "hidden_size", "d_model", "vocab_size", "latent_channels", "num_layers", "num_single_layers", "sample_size",
    "scaling_factor", "force_upcast", "guidance_embeds",
)  # fmt: skip


def inspect_pipeline(folder: Path) -> dict[str, Any]:
    """`kind` (pipeline, or component for a model of diffusers alone), and facts about each model in it."""
    pipeline = open_pipeline(folder)
    components = {name: _component(component) for name, component in pipeline.components.items()}
    known = [c for c in components.values() if c["problem"] is None]
    if pipeline.class_name is None:
        ((name, only),) = components.items()
        return {"kind": "component", "role": name} | only
    index = pipeline.index
    return {
        "kind": "pipeline",
        "class": pipeline.class_name,
        "denoiser": pipeline.denoiser.name if pipeline.denoiser else None,
        "parameters": sum(c["parameters"] for c in known),
        "bytes": sum(c["bytes"] for c in known),
        "dtypes": dict(sum((Counter(c["dtypes"]) for c in known), Counter())),
        "components": components,
        "without_weights": {name: index[name][1] for name in pipeline.others},
        "absent": [name for name, told in index.items() if told == [None, None]],
        "saved_by_diffusers": index.get("_diffusers_version"),
        "merged_by_lora_export": (folder / CERTIFICATE).is_file(),
    }


def _component(component: Component) -> dict[str, Any]:
    """One model; `problem`: why its weights cannot be read, None where they can."""
    folder, config = component.folder, component.config
    document: dict[str, Any] = {
        "class": component.class_name,
        "library": component.library,
        "settings": {key: config[key] for key in _TOLD if config.get(key) is not None},
        "variants": [variant or "none" for variant in variants_in(folder)],
        "merged_by_lora_export": (folder / CERTIFICATE).is_file(),
    }
    try:
        checkpoint = open_component(component)
    except LoraExportError as error:
        return document | {"problem": error.found}
    quantization = settings_of(with_settings(folder, config))
    return document | {
        "parameters": parameters_of_base(checkpoint),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "files": sorted({t.file.name for t in checkpoint.tensors.values()}),
        "quantization": describe(quantization) if quantization else method_here(checkpoint, config),
        "problem": None,
    }


# --- adapters ------------------------------------------------------------------------------------------------


def inspect_file(path: Path, base: Path | None) -> dict[str, Any]:
    """A single-file adapter: what it says of itself, and with a base whether every tensor finds its weight.

    AdapterError for a file of another nature, such as a ControlNet.
    """
    tensors, metadata = open_single_file(path)
    file = AdapterFile(tensors, {}, path)
    if not file.tensors:
        raise file.refuse("the adapter holds no tensors", expected="trained matrices")
    seen = look_at(file, metadata)
    infos = file.tensors
    ranks = Counter(m.rank for m in seen.modules if m.rank)
    scales = Counter[float | None](m.scale for m in seen.modules if m.scale is not None)
    document: dict[str, Any] = {
        "kind": "diffusion adapter",
        "summary": _summary(seen, metadata, parameters(infos), sorted({t.dtype for t in infos.values()})),
        "format": seen.format,
        "components": dict(sorted(Counter(m.role for m in seen.modules).items())),
        "kinds": dict(sorted(Counter(m.kind for m in seen.modules).items())),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": _spread(Counter(m.alpha for m in seen.modules if m.rank)),
        "scales": _spread(scales),
        "targets": dict(Counter(m.target for m in seen.modules).most_common()),
        "tokens": _tokens(seen.vectors),
        "metadata": that_matters(metadata),
        "parameters": parameters(infos),
        "dtypes": dict(Counter(t.dtype for t in infos.values())),
        "tensors": len(infos),
        "bytes": sum(t.nbytes for t in infos.values()),
        "unknown_tensors": list(seen.unknown),
        "problems": list(seen.problems),
    }
    return document if base is None else document | fit(base, path)


def fit(base: Path, adapter: Path) -> dict[str, Any]:
    """Whether every tensor of an adapter finds its weight in a base, and how many weights would change."""
    if not is_pipeline(base):
        return {
            "fits_base": False,
            "why_not": "the base is no image model: it has no model_index.json, and no _class_name of diffusers",
        }
    from lora_export.merging.pipelines.planning import plan_pipeline

    try:
        planned = plan_pipeline(base, [AdapterChoice(adapter)], MergeOptions())
    except LoraExportError as error:
        where = f" ({error.tensor})" if error.tensor else ""
        return {"fits_base": False, "why_not": f"{error.found}{where}", "expected": error.expected}
    (read,) = planned.adapters
    return {
        "fits_base": True,
        "would_change": {name: plan.counts for name, plan in planned.components.items()},
        "new_tokens": planned.tokens.ids(planned.components),
        "warnings": list(planned.warnings),
        "kinds": dict(sorted(read.kinds.items())),
        "used_tensors": planned.adapter_tensors,
    }


def _tokens(vectors: Sequence[Vectors]) -> dict[str, Any]:
    """Token → how many vectors it stands for in each text encoder."""
    tokens: dict[str, Any] = {}
    for one in vectors:
        which = one.encoder or ("by width" if one.number is None else f"text encoder {one.number + 1}")
        tokens.setdefault(one.tokens[0], {})[which] = len(one.tokens)
    return tokens


def _spread(counts: Mapping[float | None, int]) -> dict[str, int]:
    """Value → modules, the smallest first; `not in the file` where there is none."""
    known = sorted((value, count) for value, count in counts.items() if value is not None)
    spread = {f"{value:g}": count for value, count in known}
    return spread | ({"not in the file": counts[None]} if None in counts else {})


def _summary(seen: Seen, metadata: Mapping[str, str], count: int, dtypes: Sequence[str]) -> str:
    """The adapter in sentences: format, kinds, ranks, components, alpha, and what to look out for."""
    kinds = " and ".join(k for k, _ in Counter(m.kind for m in seen.modules).most_common())
    ranks = sorted({m.rank for m in seen.modules if m.rank})
    span = f" of ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f" of rank {ranks[0]}" if ranks else ""
    roles = ", ".join(
        f"{n} {'module' if n == 1 else 'modules'} of {role}"
        for role, n in Counter(m.role for m in seen.modules).most_common()
    )
    of = next((metadata[k] for k in ("modelspec.architecture", "ss_base_model_version") if metadata.get(k)), None)
    scales = sorted({m.scale for m in seen.modules if m.scale is not None})
    said = sum(m.alpha is not None for m in seen.modules if m.rank)
    with_rank = sum(bool(m.rank) for m in seen.modules)
    sentences = []
    if seen.modules:
        sentences.append(f"{kinds}{span} on {roles}, as {seen.format} files spell them.")
    if seen.vectors:
        sentences.append(f"Vectors of textual inversion: {', '.join(_tokens(seen.vectors))}.")
    sentences.append(f"{count:,} parameters in {' and '.join(dtypes)}{f', for {of}' if of else ''}.")
    if with_rank and not said:
        sentences.append("The file does not say alpha, so it counts as the rank: the factor is 1.")
    elif len(scales) > 1:
        sentences.append(f"alpha/rank differs between modules, {scales[0]:g} to {scales[-1]:g}.")
    elif scales:
        sentences.append(f"alpha/rank is {scales[0]:g} everywhere.")
    if seen.splits_qkv:
        sentences.append("q, k and v were trained apart (split_qkv): a merge asks for --split-qkv-alpha.")
    if seen.unknown:
        sentences.append(f"{len(seen.unknown)} tensors have endings of no kind that is known.")
    if seen.problems:
        sentences.append(f"A merge would refuse it: {seen.problems[0]}.")
    return " ".join(sentences)
