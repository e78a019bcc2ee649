"""A short program that draws the sample of a pipeline again, and prints how close its picture comes, in dB."""

from collections.abc import Sequence

from lora_export.errors import InputError
from lora_export.packages.interpreters import Python
from lora_export.packages.job import Drawing, PackageFacts, Snippet

# In fp32, other versions and processors add in another order, which moves numbers by a millionth or so.
EXACT, LEAST_PSNR = "fp32", 60.0
STEP = "fewer than one number in fifteen is a step of 1/255 off"
SAMPLE = "sample.png"  # in the package: the picture that the graphs of the run drew
KEPT = "../picture.png"  # beside the package, in which a new file would be one that does not belong to it
EQUAL = "equal"  # what the program prints where no pixel differs: JSON has no infinity


def picture_program(
    facts: PackageFacts,
    folder: str,
    library: str,
    name: str,
    setup: str,
    arguments: Sequence[str] = (),
    then: str = "",
) -> Snippet:
    """For a class of `library` with from_pretrained and the call of diffusers' pipelines.

    arguments: of from_pretrained, beside the folder; then: what is called of the pipeline.
    """
    drawing, prompt = drawing_in(facts)
    called = {
        "height": drawing.height,
        "width": drawing.width,
        "num_inference_steps": drawing.steps,
        "guidance_scale": drawing.guidance,
        **({"max_sequence_length": drawing.tokens} if drawing.tokens is not None else {}),
    }
    lines = [
        "import json",
        "import numpy as np",
        "import torch",
        "from PIL import Image",
        f"from {library} import {name}",
        f"folder = {folder!r}",
        f"pipeline = {name}.from_pretrained({', '.join(['folder', *arguments])}){then}",
        "pipeline.set_progress_bar_config(disable=True)",
        f"noise = np.random.RandomState({drawing.seed}).standard_normal({drawing.latents!r})",
        "drawn = pipeline(",
        f"    {prompt!r},",
        f"    {', '.join(f'{key}={value!r}' for key, value in called.items())},",
        '    latents=torch.from_numpy(noise).float(), output_type="np",',
        ").images[0]",
        "pixels = np.round(255 * drawn).astype(np.uint8)",
        f'sample = np.asarray(Image.open(folder + "/{SAMPLE}"), dtype=float)',
        "error = np.mean((pixels - sample) ** 2)",
        f'print(json.dumps(round(10 * np.log10(255**2 / error), 2) if error else "{EQUAL}"))',
    ]
    return Snippet(Python(), setup, "\n".join(lines))


def keeping(snippet: Snippet) -> Snippet:
    """The same program, which leaves its picture beside the package as well."""
    *lines, last = snippet.code.splitlines()
    saved = f'Image.fromarray(pixels).save("{KEPT}")'
    return Snippet(snippet.interpreter, snippet.setup, "\n".join([*lines, saved, last]))


def notes(facts: PackageFacts, *, checked: bool) -> str:
    """What to know of the picture, for the README. checked: whether the package has a safety checker."""
    drawing, _ = drawing_in(facts)
    lines = [
        f"The picture lies in `{KEPT}`. It takes {drawing.steps} steps at half the size, so that it can be "
        "compared in little time: for a good one, leave out `height`, `width` and `latents`, and ask for 30 steps.",
    ]
    if checked:
        lines.append(
            "The program leaves out the safety checker, which may blacken a picture. Without "
            "`safety_checker=None`, it looks at every one."
        )
    return "\n".join(lines)


def drawing_in(facts: PackageFacts) -> tuple[Drawing, str]:
    """How the sample is drawn, and its prompt. InputError for a package that does not say."""
    if facts.sample is None or facts.sample.drawing is None:
        raise InputError(
            "the manifest of the package does not say how its picture is drawn",
            expected="sample.drawing",
            next_step="package the run again",
        )
    return facts.sample.drawing, facts.sample.prompt
