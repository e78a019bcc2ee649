"""Short programs that load a package and print its answer to a sample, as one line of JSON.

A README shows them and `verify --run` runs them. They contain no names from a model.
"""

import json
from collections.abc import Sequence

from lora_export.packages.interpreters import Node, Python
from lora_export.packages.job import PackageFacts, Snippet
from lora_export.packages.tasks import PackageTask

TOKENS = 32  # that are generated, greedily
NUMBERS = 8  # of the first output, where a model does not generate
PROMPT = "The capital of France is"
_SECOND = 16_000  # samples of one second of sound


# The processors of transformers.js that are given the picture first.
_PICTURE_FIRST = ("llava", "paligemma")


def prompt_of(facts: PackageFacts) -> str:
    return facts.sample.prompt if facts.sample else PROMPT


def python_program(facts: PackageFacts, folder: str, library: str, auto: str, setup: str) -> Snippet:
    """For classes with from_pretrained and the inputs and outputs of transformers."""
    task = facts.task
    reader = "AutoTokenizer" if task.input == "text" else "AutoProcessor"
    lines = [
        "import json",
        *(["import torch"] if task.input != "text" else []),
        *(
            [f"from transformers import {', '.join(sorted((auto, reader)))}"]
            if library == "transformers"
            else [f"from {library} import {auto}", f"from transformers import {reader}"]
        ),
        f"folder = {folder!r}",
        f"reader = {reader}.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder)",
        *_inputs(task, prompt_of(facts)),
    ]
    if task.generates:
        start = "inputs.input_ids.shape[1]" if _continues(task) else "0"
        lines += [
            f"tokens = model.generate(**inputs, max_new_tokens={TOKENS}, do_sample=False)[0]",
            f"print(json.dumps(reader.decode(tokens[{start}:], skip_special_tokens=True)))",
        ]
    else:
        lines += [f"print(json.dumps(model(**inputs)[0].flatten()[:{NUMBERS}].tolist()))"]
    return Snippet(Python(), setup, "\n".join(lines))


def _inputs(task: PackageTask, prompt: str) -> list[str]:
    text = repr(prompt)
    if task.name == "multiple-choice":  # (rows, choices, tokens)
        return [
            f'choices = reader(2 * [{text}], return_tensors="pt")',
            "inputs = {name: value[None] for name, value in choices.items()}",
        ]
    if task.input == "text":
        return [f'inputs = reader({text}, return_tensors="pt")']
    if task.input == "video":
        return [
            "frames = torch.zeros(model.config.num_frames, 3, 224, 224)",
            'inputs = reader(list(frames), return_tensors="pt")',
        ]
    if task.input == "audio":
        return [f'inputs = reader(torch.zeros({_SECOND}).numpy(), sampling_rate={_SECOND}, return_tensors="pt")']
    picture = "torch.zeros(3, 224, 224)"
    if task.sees_and_writes:
        content = f'[{{"type": "image"}}, {{"type": "text", "text": {text}}}]'
        return [
            f'chat = [{{"role": "user", "content": {content}}}]',
            "words = reader.apply_chat_template(chat, add_generation_prompt=True)",
            f'inputs = reader(text=words, images={picture}, return_tensors="pt")',
        ]
    words = f"text=[{text}], " if task.input == "both" else ""
    return [f'inputs = reader({words}images={picture}, return_tensors="pt")']


def _continues(task: PackageTask) -> bool:
    """Whether what is generated stands behind the prompt."""
    return task.name == "text-generation" or task.sees_and_writes


_PAGE = """<!doctype html>
<meta charset="utf-8">
<script type="importmap">
{{"imports": {{"@huggingface/transformers": "./node_modules/@huggingface/transformers/dist/transformers.min.js"}}}}
</script>
<body><script type="module">
{program}
</script></body>
"""
_OF_PAGE = (
    "env.allowLocalModels = true;",
    'env.localModelPath = "./";',
    'env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", location.href).href;',
    "const graphics = await navigator.gpu?.requestAdapter();",
    # With subgroups of 4, onnxruntime-web 1.31 computes attention wrong for prompts of more than 32 tokens.
    'const narrow = graphics?.features.has("subgroups") && !(graphics.info.subgroupMinSize >= 8);',
    'const device = graphics && !narrow ? "webgpu" : "wasm";',
)


def web_page(facts: PackageFacts, folder: str, dtype: str) -> str:
    """A page beside the folder and node_modules, which shows the answer to the sample."""
    options, show = f"dtype: {json.dumps(dtype)}, device", "document.body.textContent = {};"
    program = _javascript(facts, folder, options, _OF_PAGE, show)
    return _PAGE.format(program=program.replace("<", "\\u003c"))  # a prompt must not end the script


def javascript_program(facts: PackageFacts, folder: str, dtype: str, setup: str) -> Snippet:
    """For transformers.js on Node."""
    code = _javascript(facts, folder, f"dtype: {json.dumps(dtype)}", (), "console.log({});")
    return Snippet(Node(), setup, code)


def _javascript(facts: PackageFacts, folder: str, options: str, settings: Sequence[str], show: str) -> str:
    """options: of from_pretrained; settings: lines; show: the statement that shows a text."""
    task = facts.task
    reader = "AutoTokenizer" if task.input == "text" else "AutoProcessor"
    tokenizes = task.generates or task.input == "both"
    names = sorted({task.js, reader, *(["AutoTokenizer"] if tokenizes else []), "env"})
    lines = [
        f'import {{ {", ".join(names)} }} from "@huggingface/transformers";',
        "env.allowRemoteModels = false;",
        *settings,
        f"const folder = {json.dumps(folder)};",
        f"const reader = await {reader}.from_pretrained(folder);",
        f"const model = await {task.js}.from_pretrained(folder, {{ {options} }});",
    ]
    text = json.dumps(prompt_of(facts))
    if task.input == "audio":
        lines += [f"const inputs = await reader(new Float32Array({_SECOND}));"]
    elif task.name == "multiple-choice":  # (rows, choices, tokens)
        lines += [
            f"const inputs = await reader([{text}, {text}]);",
            "for (const name in inputs) inputs[name] = inputs[name].unsqueeze(0);",
        ]
    elif task.input == "text":
        lines += [f"const inputs = await reader({text});"]
    else:
        lines.insert(0, 'import { RawImage } from "@huggingface/transformers";')
        image = "new RawImage(new Uint8ClampedArray(3 * 224 * 224), 224, 224, 3)"
        if task.sees_and_writes:
            lines += _picture_and_text(text, image, str(facts.config.get("model_type")))
        elif task.input == "both":
            lines += [
                f"const words = (await AutoTokenizer.from_pretrained(folder))([{text}]);",
                f"const image = await reader({image});",
                "const inputs = { ...words, ...image };",
            ]
        else:
            lines += [f"const inputs = await reader({image});"]
    if task.generates:
        start = "inputs.input_ids.dims[1]" if _continues(task) else "0"
        decoder = "reader" if reader == "AutoTokenizer" else "(await AutoTokenizer.from_pretrained(folder))"
        lines += [
            f"const tokens = await model.generate({{ ...inputs, max_new_tokens: {TOKENS}, do_sample: false }});",
            f"const said = {decoder}.decode(tokens.tolist()[0].slice({start}), {{ skip_special_tokens: true }});",
            show.format("JSON.stringify(said)"),
        ]
    else:
        lines += [
            "const first = Object.values(await model(inputs))[0];",
            show.format(f'JSON.stringify(Array.from(first.to("float32").data.slice(0, {NUMBERS})))'),
        ]
    return "\n".join(lines)


def _picture_and_text(text: str, image: str, kind: str) -> list[str]:
    """kind: the model_type. A model without a template for chats is given its placeholder and the text."""
    chat = f'[{{ role: "user", content: [{{ type: "image" }}, {{ type: "text", text: {text} }}] }}]'
    given = "image, words" if kind in _PICTURE_FIRST else "words, image"
    return [
        f"const image = {image};",
        "const token = reader.image_token ?? reader.config.image_token ?? reader.constructor.image_token;",
        "const template = reader.chat_template ?? reader.tokenizer.chat_template;",
        f"const words = template ? reader.apply_chat_template({chat}, {{ add_generation_prompt: true }})",
        f"  : token + {text};",
        f"const inputs = await reader({given});",
    ]
