"""The battery for the models of a pipeline: a denoiser's step, pictures to latents and back, texts to states.

What a graph's inputs and outputs mean in PyTorch is said here once more, by diffusers' own documentation of its
models. So a graph whose exporter confuses two of them differs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from lora_export.graph_runs.signature import IDS, Signature
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.model import shapes_of
from lora_export.validation.graphs.numbers import judged, numbers_of
from lora_export.validation.proof import reference
from lora_export.validation.proof.made_up import Ids, generator
from lora_export.validation.proof.single import rounded
from lora_export.validation.proof.trial import Expected, Extent, Graphs, Reference, Trial

Feed = Mapping[str, torch.Tensor]
# Numbers of which sines are taken: a pipeline in 16 bits gives them in 32 as well.
_WIDE = ("timestep", "guidance", "txt_ids", "img_ids", "time_ids")
_STEPS = (981.0, 1.25, 499.5, 20.0)
_ALL_STEPS, _GUIDANCE, _PIXELS = 1000, 3.5, 1024


# --- the model ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loaded(request: Mapping[str, Any]) -> Iterator[reference.Loaded]:
    """The model of one graph of a pipeline, which takes the graph's inputs by name and returns its outputs."""
    part, own = request["part"], request["precision"] in reference.QUANTIZED or request["streamed_numbers"]
    if part.startswith("text_encoder"):
        with reference.loaded({**request, "kind": "encoder"}) as of:
            yield replace(of, model=_Component(of.model, part))
        return
    folder = Path(request["model"])
    model, streamed = _load(folder, request["architecture"])
    wrong: list[str] = []
    words = f"{type(model).__name__} of diffusers in fp32, with the checkpoint's weights"
    if own:
        wrong = _take_over(model, folder, Path(request["export"]), request)
        words = f"{type(model).__name__} of diffusers in fp32, with the weights that the graph holds"
    words += ", read from their files when they are needed" if streamed else ""
    yield reference.Loaded(_Component(model, part, streamed), words, tuple(wrong), streamed)


def _load(folder: Path, architecture: str) -> tuple[Any, bool]:
    """The model in fp32; in its own type, and in fp32 module by module while it runs, where memory is short."""
    import diffusers

    large = reference.fp32_bytes(folder) > psutil.virtual_memory().available // 2
    model = getattr(diffusers, architecture).from_pretrained(
        folder,
        torch_dtype=_stored_type(folder) if large else torch.float32,
        variant=reference.variant_of(folder),
        use_safetensors=True,
        local_files_only=True,
    )
    model = model.eval().requires_grad_(False)
    if large:
        _widen_while_running(model)
    return model, large


def _stored_type(folder: Path) -> torch.dtype:
    """The type of the first tensor in a folder's files."""
    file = min(folder.glob("*.safetensors"))
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype  # type: ignore[no-any-return]


def _widen_while_running(model: torch.nn.Module) -> None:
    held: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}

    def before(module: torch.nn.Module, _: Any) -> None:
        held[module] = {n: p.data for n, p in module._parameters.items() if p is not None}
        for name, value in held[module].items():
            module._parameters[name].data = value.float()  # type: ignore[union-attr]

    def after(module: torch.nn.Module, _: Any, result: Any) -> None:
        for name, value in held.pop(module).items():
            module._parameters[name].data = value  # type: ignore[union-attr]

    for module in model.modules():
        if any(p is not None for p in module._parameters.values()):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)


def _take_over(model: Any, folder: Path, export: Path, request: Mapping[str, Any]) -> list[str]:
    """Give the model the weights of the graph, and say which are not the checkpoint's, if it has the numbers."""
    shapes = shapes_of(folder)
    numbers, wrong = numbers_of(folder), []
    state: dict[str, torch.Tensor] = {}
    for held in graph_weights.read([export / name for name in request["graphs"]], shapes):
        wanted = None if request["streamed_numbers"] else numbers(held)
        if wanted is not None and not judged(held, wanted, None, None)[0] <= 1:
            wrong.append(held.tensor)
        whole = state.setdefault(held.tensor, torch.full(tuple(shapes[held.tensor]), float("nan")))
        rows = whole.reshape(whole.shape[0] if whole.dim() else 1, -1)
        rows[held.start : held.stop] = held.values.reshape(held.stop - held.start, -1)
    model._fix_state_dict_keys_on_load(state)  # names of old autoencoders
    model.load_state_dict(state, strict=False)
    return list(dict.fromkeys(wrong))


class _Component(torch.nn.Module):
    """feed: a graph's inputs, by name → its outputs, by name. widened: whether it computes in fp32, whatever type
    its weights have meanwhile."""

    def __init__(self, model: Any, part: str, widened: bool = False) -> None:
        super().__init__()
        self.model, self._part, self._widened = model, part, widened
        self.config = model.config

    def forward(self, feed: Feed) -> dict[str, torch.Tensor]:
        own = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        dtype = torch.float32 if self._widened else own
        given = {
            name: value if not value.is_floating_point() or name in _WIDE else value.to(dtype)
            for name, value in feed.items()
        }
        return _CALLS.get(self._part, _texts)(self.model, given)


def _unet(model: Any, given: Feed) -> dict[str, torch.Tensor]:
    added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    result = model(
        given["sample"],
        given["timestep"],
        given["encoder_hidden_states"],
        timestep_cond=given.get("timestep_cond"),
        added_cond_kwargs=added or None,
    )
    return {"out_sample": result.sample}


def _transformer(model: Any, given: Feed) -> dict[str, torch.Tensor]:
    return {"out_hidden_states": model(**given).sample}


def _encoded(model: Any, given: Feed) -> dict[str, torch.Tensor]:
    return {"latent_parameters": model.encode(given["sample"]).latent_dist.parameters}


def _decoded(model: Any, given: Feed) -> dict[str, torch.Tensor]:
    return {"sample": model.decode(given["latent_sample"]).sample}


def _texts(model: Any, given: Feed) -> dict[str, torch.Tensor]:
    result = model(input_ids=given[IDS], output_hidden_states=True)
    states = {f"hidden_states.{i}": state for i, state in enumerate(result.hidden_states)}
    return states | {
        name: result[name] for name in ("last_hidden_state", "pooler_output", "text_embeds") if name in result
    }


_CALLS: Mapping[str, Callable[[Any, Feed], dict[str, torch.Tensor]]] = {
    "unet": _unet,
    "transformer": _transformer,
    "vae_encoder": _encoded,
    "vae_decoder": _decoded,
}


# --- what is tried -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """rows, tokens: of a batch, of a text; height, width: of latents; step: of the scheduler."""

    rows: int
    height: int
    width: int
    tokens: int
    step: float

    def size(self, axis: int | str | None, scale: int) -> int:
        """Of an axis of an input. scale: pixels of a picture for each latent."""
        if isinstance(axis, int):
            return axis
        name = axis or ""
        if name in ("batch_size", "step"):
            return self.rows
        if name == "packed_height_width":
            return self.height * self.width
        sizes = {"height": self.height, "width": self.width, "sequence_length": self.tokens}
        own = next((n for key, n in sizes.items() if key in name), self.tokens)
        return own * (scale if name.startswith("sample") else 1)


def trials(model: Reference, graphs: Graphs, extent: Extent) -> Iterator[Trial]:
    """Batches, sizes, lengths and steps that were not traced; sizes that no power of two divides, too."""
    name = graphs.names[0]
    signature = graphs.signature(name)
    for number, case in enumerate(_cases(signature, model.config, extent.full)):
        feed = _feed(signature, case, model.config, (number, model.seed))
        result = model(feed=feed)
        expected: Expected = {n: result[n].float() for n in signature.outputs if n in result}
        found, failure = graphs.run(name, feed)
        yield Trial(_words(feed), name, feed, expected, found, failure)


def _cases(signature: Signature, config: Any, full: bool) -> list[_Case]:
    unit = 1
    if "sample" in signature.inputs and "timestep" in signature.inputs:  # a UNet halves its latents
        unit = 2 ** (len(config.block_out_channels) - 1)
    elif "pooled_projections" in signature.inputs and "img_ids" not in signature.inputs:
        unit = config.patch_size
    odd = 1 if unit > 1 and "pooled_projections" not in signature.inputs else 0
    longest = getattr(config, "max_position_embeddings", None) or 512
    cases = [
        _Case(3, 8 * unit, 5 * unit, min(77, longest), _STEPS[0]),
        _Case(1, 7 * unit + odd, 8 * unit, 23, _STEPS[1]),
    ]
    if full:
        cases += [
            _Case(5, 4 * unit, 12 * unit, 7, _STEPS[2]),
            _Case(2, 12 * unit, 13 * unit - odd, min(154, longest), _STEPS[3]),
        ]
    return cases


def _feed(signature: Signature, case: _Case, config: Any, seed: object) -> dict[str, torch.Tensor]:
    scale = 2 ** (len(getattr(config, "down_block_types", None) or (0,)) - 1)
    feed = {}
    for name, of in signature.inputs.items():
        shape = [case.size(axis, scale) for axis in of.shape]
        feed[name] = rounded(_value(name, shape, case, config, seed), of)
    if "img_ids" in feed:  # FLUX counts its steps from 1 to 0
        feed["timestep"] = feed["timestep"] / _ALL_STEPS
    return feed


def _value(name: str, shape: list[int], case: _Case, config: Any, seed: object) -> torch.Tensor:
    random = generator(name, seed, *shape)
    if name == IDS:
        return Ids(config)(torch.ones(shape, dtype=torch.long), (name, seed))
    if name == "timestep":
        return torch.full(shape, case.step)
    if name == "guidance":
        return torch.full(shape, _GUIDANCE)
    if name == "time_ids":
        return torch.randint(0, _PIXELS, shape, generator=random).float()
    if name == "img_ids":
        places = torch.arange(shape[0])
        return torch.stack(
            [torch.zeros(shape[0]), (places // case.width).float(), (places % case.width).float()], 1
        )
    if name == "txt_ids":
        return torch.zeros(shape)
    return torch.randn(shape, generator=random)


def _words(feed: Feed) -> str:
    shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in feed.items() if v.dim() > 1)
    step = feed.get("timestep")
    return shapes if step is None else f"{shapes}, step {float(step.flatten()[0]):g}"
