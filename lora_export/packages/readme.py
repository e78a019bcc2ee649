"""README.md of a package: what it is, what proves it, and the commands that run it; a model card for the Hub."""

import json
from collections.abc import Mapping
from typing import Any

from lora_export import wording
from lora_export.escape import markdown, one_line
from lora_export.manifest import RecordedAdapter, RecordedSource
from lora_export.packages.companions import licences
from lora_export.packages.job import Drawing, PackageFacts, Run
from lora_export.packages.pipelines.programs import EQUAL, EXACT, LEAST_PSNR, SAMPLE, STEP

NAME = "README.md"
UNKNOWN = "unknown"  # as the Hub spells it
_METHOD = {False: "W + scaling · B · A, rounded once", True: "W + the update of each module, rounded once"}
_CERTIFICATE = {
    False: "lora_export_certificate.json",
    True: "lora_export_certificate.json, and one beside each merged model",
}
_INHERITED = ("language", "license_name", "license_link", "datasets")


def licence_of(run: Run, given: str | None) -> str | None:
    """The given licence, or that of the base's model card; None if neither states one."""
    licence = given or _base_card(run).get("license")
    return one_line(licence) if isinstance(licence, str) else None


def write(run: Run, facts: PackageFacts, licence: str | None) -> str:
    """The whole text. licence: None if it is not known."""
    if facts.target.for_hub:
        return _model_card(run, facts, licence)
    lines = [f"# {markdown(facts.name)} for {facts.target.title}", "", *_about(run, facts)]
    lines += [f"- licence: {markdown(licence)}"] * bool(licence) + ["", *_how_to_run(facts)]
    return "\n".join(lines) + "\n"


def _about(run: Run, facts: PackageFacts) -> list[str]:
    """What was merged into what, and the results of the checks."""
    names = [markdown(a.name) for a in run.manifest.adapters]
    how = "beside its weights, merged and checked" if facts.adapters else "merged into its weights"
    adapters = f"the adapter{'s' * (len(names) > 1)} {' and '.join(names)}"
    lines = [f"{markdown(run.manifest.base.name)} with {adapters} {how} by lora-export."]
    return [*lines, *(f"- {markdown(name)}: {markdown(value)}" for name, value in _proof(run).items())]


def _proof(run: Run) -> dict[str, str]:
    """The figures of the run's report in words."""
    merge, validation, bench = run.merge, run.validation, run.report.benchmark
    proof = {"adapter tensors merged": wording.adapter_tensors(merge)}
    if merge.delta_survival is not None:
        proof["update that survived rounding"] = wording.percent(merge.delta_survival, 4)
    proof["checks against the unmerged model"] = f"{wording.checks_passed(validation)} passed"
    difference = next((c.value for c in validation.checks if c.name == "onnx_logits_max_abs"), None)
    if difference is not None:
        proof["largest difference of an ONNX output"] = wording.number(difference, 2)
    if bench:
        proof["graph, compared with the base"] = wording.GRAPH[bench.graph_identical]
        proof["latency against the base"] = wording.latency_verdict(bench)
    return proof


def _how_to_run(facts: PackageFacts) -> list[str]:
    snippet, sample = facts.target.snippet(facts, "."), facts.sample
    lines = ["## Run it", "", "In this folder:", "", "```bash", snippet.setup, "```", ""]
    lines += ["```bash", f"{snippet.interpreter.command} <<'END'", snippet.code, "END", "```", ""]
    if sample is not None and sample.drawing is not None:
        lines += [*_picture(sample.drawing), ""]
    elif sample is not None:  # JSON, in which no fence can end
        answer = sample.text if sample.text is not None else list(sample.numbers)
        whose = "The unmerged model answers" if sample.text is not None else "The validated graph computes"
        lines += [f"{whose}:", "", "```json", json.dumps(answer, ensure_ascii=False), "```", ""]
    notes = facts.target.notes(facts)
    lines += [notes.rstrip(), ""] if notes else []
    what = "picture" if facts.task.draws else "answer"
    return [*lines, "", f"`lora-export verify .` checks every file, and with `--run` also the model's {what}."]


def _picture(drawing: Drawing) -> list[str]:
    """What the program prints, and the picture that it is about."""
    strict = f" At least {LEAST_PSNR:g} dB are expected: {STEP}." if drawing.precision == EXACT else ""
    return [
        "The program prints how close its picture comes to the one that the validated "
        f'{drawing.precision} graphs drew, as PSNR in dB, or "{EQUAL}".{strict}',
        "",
        f"![sample]({SAMPLE})",
    ]


# --- the model card ------------------------------------------------------------------------------------------


def _model_card(run: Run, facts: PackageFacts, licence: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    manifest, base = run.manifest, _base_card(run)
    data = ModelCardData(
        base_model=one_line(manifest.base.name.partition("@")[0]),
        base_model_relation="merge" if len(manifest.adapters) > 1 else "finetune",
        library_name="diffusers" if run.task.draws else "transformers",
        license=licence or UNKNOWN,
        pipeline_tag=run.task.pipeline,
        tags=["lora", "merged", "lora-export"],
        **{k: base[k] for k in _INHERITED if k in base and ("license" in base or not k.startswith("license_"))},
    )
    body = [f"# {markdown(facts.name)}", "", *_about(run, facts), "", "## How it was made", "", *_how_made(run), ""]
    body += [*_how_to_run(facts), "", "## Licence", "", _terms(run, licence)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body) + "\n"))


def _base_card(run: Run) -> Mapping[str, Any]:
    """The metadata of the base's model card; empty where there is none that can be read."""
    path = run.companions / NAME
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        data: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's errors, and what the Hub's classes raise for odd metadata
        return {}
    return data


def _how_made(run: Run) -> list[str]:
    options = run.manifest.recorded_options.merge
    rows = {
        "base": _named(run.manifest.base),
        **{f"adapter {i + 1}": f"{_named(a)}, weight {a.weight:g}" for i, a in enumerate(run.manifest.adapters)},
        "method": options.combine if options.combine != "none" else _METHOD[run.task.draws],
        "base weights": run.merge.base_weights,
        "type": run.merge.dtype,
        "certificate": f"{_CERTIFICATE[run.task.draws]}: each tensor's hash, rounding and surviving update",
    }
    return [f"- {markdown(name)}: {markdown(value)}" for name, value in rows.items()]


def _named(source: RecordedSource | RecordedAdapter) -> str:
    return f"{source.name} @ {source.commit}" if source.commit else source.name


def _terms(run: Run, licence: str | None) -> str:
    names = ", ".join(markdown(p.name) for p in licences(run))
    terms = f"The base is under {markdown(licence)}." if licence else "The base states no licence: ask its authors."
    return f"{terms} Its files {names} lie beside this card." if names else terms
