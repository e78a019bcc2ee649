"""Pictures, and what each model of a pipeline is given while one is made. The loop is the pipeline's own class."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import Pipeline
from lora_export.errors import InputError
from lora_export.validation.pipelines.loading import pipeline_class

PROMPTS = ("a photograph of an old lighthouse at dusk", "a bowl of red apples, watercolour")
TIMES = (0.001, 0.25, 0.5, 0.75, 0.999)  # of the scheduler's own range
LONGEST = 300  # characters of a library's message
FRAMES = 5  # of a film, whose first one is shown
UNIT = 8  # pixels that sizes are multiples of, at least


@dataclass(frozen=True)
class Call:
    """What a model is given once. label: of the check; arguments: of `forward`, by name."""

    label: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """latents: that the decoder gets, (batch, …); picture: (height, width, 3) in 0 … 1."""

    latents: torch.Tensor
    picture: torch.Tensor


@dataclass
class Sampler:
    """pipe: diffusers' pipeline with models in fp32; steps, size, seed: of every picture; prompts: the first is
    painted."""

    pipe: Any
    steps: int
    size: int
    seed: int
    prompts: tuple[str, ...] = PROMPTS
    more: dict[str, Any] = field(default_factory=dict)

    def sample(self) -> Sample:
        """One picture, from the same noise each time."""
        with _decoded(self.pipe.vae) as latents:
            made = self._run(list(self.prompts[:1]), self.steps, "pt")
        images = made.images if hasattr(made, "images") else made.frames[0]
        return Sample(latents[0].float(), images[0].float().permute(1, 2, 0).cpu())

    def calls(self) -> dict[str, list[Call]]:
        """Component → what it is given for two prompts without guidance: the first step's call of the denoiser,
        and every call of the text encoders."""
        parts = {n: m for n, m in self.pipe.components.items() if isinstance(m, torch.nn.Module)}
        seen: dict[str, list[Call]] = {name: [] for name in parts}
        with contextlib.ExitStack() as stack:
            for name, model in parts.items():
                stack.callback(
                    model.register_forward_pre_hook(_recorder(model, seen[name]), with_kwargs=True).remove
                )
            plain = {} if self._embeds_guidance else {"guidance_scale": 1.0}
            self._run([*self.prompts[:2], *self.prompts[:1]][:2], 1, "latent", **plain)
        return {name: calls for name, calls in seen.items() if calls}

    @property
    def _embeds_guidance(self) -> bool:
        denoiser = getattr(self.pipe, "transformer", None) or self.pipe.unet
        return bool(getattr(denoiser.config, "guidance_embeds", False))

    def _run(self, prompts: list[str], steps: int, output: str, **more: Any) -> Any:
        self.pipe.set_progress_bar_config(disable=True)
        if "num_frames" in inspect.signature(type(self.pipe).__call__).parameters:
            more["num_frames"] = FRAMES
        try:
            return self.pipe(
                prompt=prompts, num_inference_steps=steps, generator=torch.Generator().manual_seed(self.seed),
                height=self.size, width=self.size, output_type=output, **more,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{type(self.pipe).__name__} makes no picture of a prompt alone: {str(error)[:LONGEST]}",
                expected="a pipeline from text to image",
                next_step="validate its models one by one: -b BASE/transformer -m MERGED/transformer",
            ) from error

    def at_times(self, call: Call, denoiser: Any) -> list[Call]:
        """The denoiser's call with seeded latents, at timesteps over the scheduler's whole range."""
        last = int(self.pipe.scheduler.config.num_train_timesteps)
        first = "sample" if "sample" in call.arguments else "hidden_states"
        told = call.arguments.get("timestep")
        if not isinstance(call.arguments.get(first), torch.Tensor) or told is None:
            return [call]
        told = told if isinstance(told, torch.Tensor) else torch.tensor(float(told))
        # FLUX is told the share of the range, the others the timestep.
        whole = 1.0 if float(told.flatten()[0]) <= 1.0 < float(self.pipe.scheduler.timesteps[0]) else float(last)
        calls = []
        for number, share in enumerate(TIMES):
            generator = torch.Generator().manual_seed(self.seed + number)
            noise = torch.randn(call.arguments[first].shape, generator=generator)
            time = torch.full(told.shape, round(share * last) / last * whole, dtype=torch.float32)
            given = {**call.arguments, first: noise, "timestep": time}
            calls.append(Call(f"t{round(share * last)}", given))
        return calls


def open_sampler(base: Pipeline, models: Mapping[str, Any], steps: int, size: int | None, seed: int) -> Sampler:
    """diffusers' pipeline of the base's class and scheduler around these models. size: None for half of what the
    pipeline paints by itself."""
    cls = pipeline_class(base)
    none = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in base.index}
    given = {**none, **models}
    given.pop("safety_checker", None)
    if "safety_checker" in inspect.signature(cls.__init__).parameters:
        given.update(safety_checker=None, requires_safety_checker=False)
    pipe = cls.from_pretrained(str(base.folder), torch_dtype=torch.float32, local_files_only=True, **given)
    scale = int(getattr(pipe, "vae_scale_factor", UNIT))
    unit = max(UNIT, 2 * scale)
    if size is None:
        size = max(unit, _default_size(pipe, scale) // 2 // unit * unit)
    return Sampler(pipe, steps, size, seed)


def _default_size(pipe: Any, scale: int) -> int:
    latents = getattr(pipe, "default_sample_size", None)
    if latents is None:
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        latents = getattr(denoiser.config, "sample_size", None)
    latents = latents[0] if isinstance(latents, list | tuple) else latents
    return int(latents or 64) * scale


@contextlib.contextmanager
def _decoded(vae: Any) -> Iterator[list[torch.Tensor]]:
    """The latents that the decoder gets inside."""
    seen: list[torch.Tensor] = []
    plain = vae.decode

    def decode(z: torch.Tensor, *more: Any, **named: Any) -> Any:
        seen.append(z.detach().clone())
        return plain(z, *more, **named)

    vae.decode = decode
    try:
        yield seen
    finally:
        vae.decode = plain


def _recorder(model: Any, seen: list[Call]) -> Any:
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call("", {**dict(zip(names, args, strict=False)), **kwargs}))

    return record
