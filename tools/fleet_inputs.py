"""Inputs of bench_fleet.py, made by a process of its own, as the benchmark itself stays small.

    python tools/fleet_inputs.py tiny FOLDER BASES ADAPTERS      tiny Llamas, and adapters of each
    python tools/fleet_inputs.py smol FOLDER ADAPTERS            SmolLM2, and adapters mixed of the two of examples/
    python tools/fleet_inputs.py many FOLDER ADAPTERS            one tiny Llama, and adapters of 1 KB by thousands
    python tools/fleet_inputs.py finish JOBS ROOT                an object and a record for each row, for a rerun

What is there already is kept. The first line of stdout is the folder of the base.
"""

import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = "a few words that are read by every model here, and then again. " * 8


def tiny(folder: Path, bases: int, adapters: int) -> None:
    import torch

    from tests.validation.conftest import save_adapter, save_base

    for b in range(bases):
        base = folder / f"base{b}"
        if not base.exists():
            save_base(folder / "new", torch.float32)
            if b:
                _shifted(folder / "new" / "model.safetensors", b)
            (folder / "new").rename(base)
        for a in range(adapters):
            adapter = folder / f"adapters{b}" / f"a{b}-{a:03}"
            if not adapter.exists():
                save_adapter(base, folder / "new-adapter", seed=1000 * b + a + 1)
                adapter.parent.mkdir(exist_ok=True)
                (folder / "new-adapter").rename(adapter)
    (folder / "text.txt").write_text(TEXT)
    (folder / "prompts.txt").write_text("a few words\nand then\n")


def _shifted(file: Path, seed: int) -> None:
    """Another base of the same form."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.01 * torch.randn(t.shape, generator=draw) for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def smol(folder: Path, adapters: int) -> Path:
    """Every adapter is a·ΔLoRA + b·ΔQLoRA: the factors of both side by side, in rank 16."""
    import prepare_smollm2

    base = prepare_smollm2.model()
    draw = random.Random(0)
    for number in range(adapters):
        a, b = ((1.0, 0.0), (0.0, 1.0))[number] if number < 2 else (draw.uniform(0.3, 1.2), draw.uniform(-0.6, 0.9))
        target = folder / "adapters" / f"mix-{number:02}"
        if not target.exists():
            _mixed(target, a, b)
    shutil.copy(EXAMPLES / "prompts.txt", folder / "prompts.txt")
    return base


def _mixed(target: Path, a: float, b: float) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    places = [EXAMPLES / "adapters" / n for n in ("lora-speeches", "qlora-speeches")]
    parts = [load_file(p / "adapter_model.safetensors") for p in places]
    settings = [json.loads((p / "adapter_config.json").read_text()) for p in places]
    assert len({(s["r"], s["lora_alpha"]) for s in settings}) == 1, "both have one rank and one alpha"
    rank = settings[0]["r"]
    modules = sorted({n.rsplit(".lora_", 1)[0] for part in parts for n in part})
    mixed = {}
    for module in modules:
        names = [f"{module}.lora_{which}.weight" for which in "AB"]
        present = next(p for p in parts if names[0] in p)
        shapes = [present[n].shape for n in names]
        downs = [p.get(names[0], torch.zeros(shapes[0])).float() for p in parts]
        ups = [f * p.get(names[1], torch.zeros(shapes[1])).float() for f, p in zip((a, b), parts, strict=True)]
        mixed[names[0]], mixed[names[1]] = torch.cat(downs, 0), torch.cat(ups, 1)
    targets = sorted({t for s in settings for t in s["target_modules"]})
    config = settings[0] | {"r": 2 * rank, "lora_alpha": 2 * settings[0]["lora_alpha"], "target_modules": targets}
    stage = target.with_name(f".{target.name}")
    stage.mkdir(parents=True, exist_ok=True)
    save_file(mixed, stage / "adapter_model.safetensors", {"format": "pt"})
    (stage / "adapter_config.json").write_text(json.dumps(config, indent=2))
    stage.rename(target)


def many(folder: Path, adapters: int) -> None:
    """One adapter of rank 1 on one module, again and again with another number in it."""
    import torch
    from safetensors.torch import save_file

    tiny(folder, 1, 1)
    settings = json.loads((folder / "adapters0" / "a0-000" / "adapter_config.json").read_text())
    settings |= {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    for number in range(adapters):
        target = folder / "many" / f"m{number:05}"
        if target.exists():
            continue
        target.mkdir(parents=True)
        factors = {name.format("A"): torch.ones(1, 64), name.format("B"): torch.full((64, 1), 1e-3 * (number + 1))}
        save_file(factors, target / "adapter_model.safetensors", {"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(settings))


def finish(jobs: Path, root: str) -> None:
    """The root as a fleet that is done leaves it, with small objects: a rerun reads their records alone."""
    from lora_export import api
    from lora_export.contracts import FleetOptions
    from lora_export.contracts.fleet import Record, RowFigures, RowOutcome
    from lora_export.fleet.stores.protocol import opened

    store = opened(root)
    stage = Path(root).with_name("stage")
    for row in api.plan_fleet(jobs, root, FleetOptions()):
        place = f"objects/{row.key}"
        if row.state == "skipped":
            continue
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        (stage / "model.onnx").write_bytes(b"small")
        figures = RowFigures(0.98, 0.99, 0.001, 1.0, 5, 30, 0)
        done = RowOutcome(row.row.name, row.key, "done", seconds=1.0, figures=figures, place=place)
        store.publish(stage, place, Record(1, row.key, {}, done, {}, base_key=row.base_key))
    shutil.rmtree(stage, ignore_errors=True)


def main() -> None:
    kind, *given = sys.argv[1:]
    if kind == "finish":
        finish(Path(given[0]), given[1])
        return
    folder = Path(given[0])
    folder.mkdir(parents=True, exist_ok=True)
    made = {"tiny": tiny, "smol": smol, "many": many}[kind](folder, *map(int, given[1:]))  # type: ignore[operator]
    print(made or folder / "base0")


if __name__ == "__main__":
    main()
