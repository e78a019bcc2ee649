"""Forged runs: something is changed, and whatever seals it is made to fit. A seed decides what, where, how much.

The forger knows the tool: hashes of tensors and files, weights-map.json, the certificate and the manifest are all
made anew, so that nothing in the folder disagrees with anything else in it.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lora_export.checkpoint.hashing import hash_tensor
from lora_export.checkpoint.header import read_header
from lora_export.merging import CERTIFICATE
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import hash_folder, read_sealed, sha256, write_json, write_sealed
from tests.builders import edit_json

Forger = Callable[["Run", random.Random], object]


class Run:
    """A run folder with merged/ and onnx/, and the base that it was made of."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.merged, self.onnx = folder / "merged", folder / "onnx"
        self.keeps_records = False  # the certificate is left as it is, but for its digest

    def weights(self, part: str | None = None) -> list[dict[str, Any]]:
        """Entries of weights-map.json: all, or those that are a part of a quantized weight."""
        found: list[dict[str, Any]] = json.loads((self.onnx / "weights-map.json").read_text())["weights"]
        return [w for w in found if part is None or w.get("quantized", {}).get("part") == part]

    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.onnx / "model.onnx", load_external_data=False)

    def save_graph(self, model: onnx.ModelProto) -> None:
        (self.onnx / "model.onnx").write_bytes(model.SerializeToString())

    def document(self, name: str) -> dict[str, Any]:
        return read_sealed(self.folder / name)

    def save_document(self, name: str, document: dict[str, Any]) -> None:
        write_sealed(self.folder / name, document)

    def reseal(self) -> None:
        """Every hash and digest made to fit what is there."""
        name = f"merged/{CERTIFICATE}"
        certificate = self.document(name)
        if not self.keeps_records:
            self._rehash(certificate)
        self.save_document(name, certificate)
        described = json.loads((self.onnx / "weights-map.json").read_text())
        described["hashes"] = {r["name"]: r["hash_out"] for r in certificate["records"]}
        described["hashes"] = dict(sorted(described["hashes"].items()))
        write_json(self.onnx / "weights-map.json", described)
        record = json.loads((self.onnx / "export.json").read_text())
        record["source_config_sha256"] = sha256(self.merged / "config.json")
        write_json(self.onnx / "export.json", record)
        manifest = self.document("manifest.json")
        manifest["files"] = {n: f for n, f in as_json(hash_folder(self.folder)).items() if n != "manifest.json"}
        self.save_document("manifest.json", manifest)

    def _rehash(self, certificate: dict[str, Any]) -> None:
        shards = sorted(self.merged.glob("*.safetensors"))
        hashes = {n: hash_tensor(t) for p in shards for n, t in read_header(p).tensors.items()}
        for record in certificate["records"]:
            record["hash_out"] = hashes[record["name"]]
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in self.merged.rglob("*") if p.is_file() and p.name != CERTIFICATE):
            data = path.read_bytes()
            if path in shards:
                header = data[: 8 + int.from_bytes(data[:8], "little")]
                files[path.name] = {"size": len(data), "header_sha256": hashlib.sha256(header).hexdigest()}
            else:
                name = path.relative_to(self.merged).as_posix()
                files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        certificate["files"] = files


# --- weights of the merged folder --------------------------------------------------------------------------


def _tensor(run: Run, pick: random.Random, updated: bool | None = None) -> Any:
    """A matrix of the merged folder: any, or one that the adapter changed, or one that was copied."""
    records = {r["name"]: r for r in run.document(f"merged/{CERTIFICATE}")["records"]}
    found = [t for p in sorted(run.merged.glob("*.safetensors")) for t in read_header(p).tensors.values()]
    fits = [
        t
        for t in found
        if len(t.shape) == 2 and (updated is None or (records[t.name]["operation"] == "updated") == updated)
    ]
    return pick.choice(fits)


def _poked(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _halves(info: Any) -> np.ndarray[Any, Any]:
    """The numbers of a bf16 tensor by their bits; a copy."""
    data = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.start)
    return data.view(np.uint16).reshape(info.shape).copy()


def one_number_of_a_weight(run: Run, pick: random.Random) -> None:
    info = _tensor(run, pick)
    values = _halves(info)
    row, column = pick.randrange(info.shape[0]), pick.randrange(info.shape[1])
    values[row, column] ^= pick.choice([1, 1 << 7, 1 << 15])  # the last bit, the exponent, the sign
    _poked(info.file, info.start, values.tobytes())


def most_rows_of_a_weight(run: Run, pick: random.Random) -> None:
    """All but the rows that follow from the shape are negated."""
    from lora_export.merging.running.exact import sampled_runs

    info = _tensor(run, pick, updated=pick.random() < 0.5)
    values = _halves(info)
    kept = [row for start, stop in sampled_runs(info.shape) for row in range(start, stop)]
    hidden = np.setdiff1d(np.arange(len(values)), kept if len(kept) < len(values) else [])
    values[pick.sample(list(hidden), max(1, len(hidden) - 3))] ^= 1 << 15
    _poked(info.file, info.start, values.tobytes())


def the_base_in_place_of_a_weight(run: Run, pick: random.Random) -> None:
    info = _tensor(run, pick, updated=True)
    before = next(
        t for p in run.base.glob("*.safetensors") for t in read_header(p).tensors.values() if t.name == info.name
    )
    _poked(info.file, info.start, _halves(before).tobytes())


def rows_exchanged(run: Run, pick: random.Random) -> None:
    info = _tensor(run, pick)
    values = _halves(info)
    first, second = pick.sample(range(len(values)), 2)
    values[[first, second]] = values[[second, first]]
    _poked(info.file, info.start, values.tobytes())


# --- documents ---------------------------------------------------------------------------------------------


def the_certificate(run: Run, pick: random.Random) -> None:
    document = run.document(f"merged/{CERTIFICATE}")
    record = pick.choice([r for r in document["records"] if r["operation"] == "updated"])
    edit = pick.choice(
        [
            lambda: record.update(survival=record["survival"] * 0.99),
            lambda: record.update(max_ulps=record["max_ulps"] / 2),
            lambda: record.update(checked=record["checked"] * 2),
            lambda: record.update(operation="copied"),
            lambda: record.update(hash_in="0" * 64),
            lambda: document.update(delta_survival=1.0),
            lambda: document["options"].update(dtype="float32"),
            lambda: document["adapters"][0].update(weight=0.5),
            lambda: document["base_checks"].pop(),
            lambda: document.update(approved=True),
        ]
    )
    edit()
    run.save_document(f"merged/{CERTIFICATE}", document)
    run.keeps_records = True


def the_manifest(run: Run, pick: random.Random) -> None:
    document = run.document("manifest.json")
    edit = pick.choice(
        [
            lambda: document["options"]["merge"].update(dtype="float16"),
            lambda: document["options"]["merge"].update(combine="ties", density=0.2),
            lambda: document["options"].update(precision="fp16"),
            lambda: document["base"]["files"]["config.json"].update(sha256="0" * 64),
            lambda: document["adapters"][0].update(weight=0.25),
            lambda: document["adapters"][0]["files"].popitem(),
            lambda: document["adapters"].append(document["adapters"][0]),
        ]
    )
    edit()
    run.save_document("manifest.json", document)


def the_export_record(run: Run, pick: random.Random) -> None:
    edit: dict[str, Any] = pick.choice(
        [{"precision": "fp32"}, {"nodes": 3}, {"task": "text-classification"}, {"optimize": "none"}]
    )
    edit_json(run.onnx / "export.json", **edit)


# --- files beside the weights ------------------------------------------------------------------------------


def _places(run: Run, pick: random.Random, name: str) -> list[Path]:
    """In one of the folders, or in both."""
    both = [run.merged / name, run.onnx / name]
    return pick.choice([both, both[:1], both[1:]])


def the_tokenizer(run: Run, pick: random.Random) -> None:
    for path in _places(run, pick, "tokenizer.json"):
        document = json.loads(path.read_text())
        vocabulary = document["model"]["vocab"]
        first, second = list(vocabulary)[-3:-1]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(document))


def the_chat_template(run: Run, pick: random.Random) -> None:
    text = pick.choice(["{{ messages }} ", "{{ x }}{# #}", ""])
    for path in _places(run, pick, "chat_template.jinja"):
        path.write_text(text)


def the_generation_config(run: Run, pick: random.Random) -> None:
    edit: dict[str, Any] = pick.choice([{"eos_token_id": 5}, {"temperature": 1.7}, {"max_length": 21}])
    for path in _places(run, pick, "generation_config.json"):
        edit_json(path, **edit)


def the_config(run: Run, pick: random.Random) -> None:
    edit: dict[str, Any] = pick.choice([{"rms_norm_eps": 1e-5}, {"sliding_window": 520}, {"eos_token_id": 9}])
    for path in _places(run, pick, "config.json"):
        edit_json(path, **edit)


def the_index(run: Run, pick: random.Random) -> None:
    path = run.merged / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    names = sorted(document["weight_map"])
    edit = pick.choice(
        [
            lambda: document["weight_map"].pop(pick.choice(names)),
            lambda: document["metadata"].update(total_size=1),
            lambda: document["weight_map"].update({names[0]: document["weight_map"][names[-1]], "x": "../y"}),
        ]
    )
    edit()
    write_json(path, document)


def a_file_more(run: Run, pick: random.Random) -> None:
    folder = pick.choice([run.merged, run.onnx, run.folder, run.folder / "report"])
    folder.mkdir(exist_ok=True)
    name = pick.choice(["modeling_llama.py", "adapter.bin", "notes.json"])
    (folder / name).write_text("import os")


# --- the export --------------------------------------------------------------------------------------------


def _data(run: Run, weight: dict[str, Any]) -> tuple[Path, int, np.ndarray[Any, Any]]:
    size = int(np.prod(weight["shape"])) * np.dtype(weight["dtype"]).itemsize
    path = run.onnx / weight["file"]
    return (
        path,
        weight["offset"],
        np.fromfile(path, weight["dtype"], offset=weight["offset"], count=-1)[
            : size // np.dtype(weight["dtype"]).itemsize
        ].copy(),
    )


def onnx_numbers(run: Run, pick: random.Random) -> None:
    """A weight that is not quantized: one number, all of them, or their last bits."""
    weight = pick.choice(
        [w for w in run.weights() if w["dtype"] == "float32" and w["made_of"] and "quantized" not in w]
    )
    path, at, values = _data(run, weight)
    edit = pick.choice(["one", "all", "bits"])
    if edit == "one":
        values[pick.randrange(len(values))] *= -1
        values[0] += 1
    elif edit == "all":
        values *= np.float32(1.01)
    else:
        values.view(np.uint32)[pick.randrange(len(values))] ^= 1
    _poked(path, at, values.tobytes())


def onnx_between_the_weights(run: Run, pick: random.Random) -> None:
    """Bytes where no weight lies: behind the last, or in a gap."""
    weights = sorted(run.weights(), key=lambda w: int(w["offset"]))
    path = run.onnx / weights[0]["file"]
    if pick.random() < 0.5:
        with path.open("ab") as file:
            file.write(b"hidden")
        return
    ends = [(w["offset"] + int(np.prod(w["shape"])) * np.dtype(w["dtype"]).itemsize) for w in weights]
    gaps = [end for end, following in zip(ends, weights[1:], strict=False) if end < following["offset"]]
    _poked(path, pick.choice(gaps), b"\1")


def quantized_blocks(run: Run, pick: random.Random) -> None:
    weight = pick.choice(run.weights("packed"))
    path, at, values = _data(run, weight)
    edit = pick.choice(["nibble", "zeros", "turned"])
    if edit == "nibble":
        values[pick.randrange(len(values))] ^= 1
    elif edit == "zeros":
        values[:] = 0x88
    else:
        values = values[::-1].copy()
    _poked(path, at, values.tobytes())


def scales_of_blocks(run: Run, pick: random.Random) -> None:
    path, at, values = _data(run, pick.choice(run.weights("scales")))
    which = slice(None) if pick.random() < 0.5 else pick.randrange(len(values))
    values[which] *= values.dtype.type(pick.choice([1.3, -1, 1.0001]))
    _poked(path, at, values.tobytes())


def an_attribute_of_the_graph(run: Run, pick: random.Random) -> None:
    """Epsilon, scale, rotary and the like; and what no session looks at."""
    model = run.graph()
    floats = [a for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.FLOAT]
    edit = pick.choice(["float", "float", "producer", "text"])
    if edit == "float" and floats:
        attribute = pick.choice(floats)
        attribute.f = attribute.f * pick.choice([2.0, 100.0]) + 1e-6
    elif edit == "producer":
        model.producer_name = "someone"
    else:
        model.graph.doc_string = "as it was"
    run.save_graph(model)


def a_constant_of_the_graph(run: Run, pick: random.Random) -> None:
    """In the graph itself: a tensor, or a whole number such as a count of heads or an axis."""
    model = run.graph()
    attributes = [a for n in model.graph.node for a in n.attribute]
    tensors = [t for t in model.graph.initializer if not t.external_data]
    tensors += [a.t for a in attributes if a.type == onnx.AttributeProto.TENSOR]
    whole = [a for a in attributes if a.type == onnx.AttributeProto.INT]
    if not tensors or pick.random() < 0.5:
        pick.choice(whole).i += pick.choice([1, -1])
        run.save_graph(model)
        return
    tensor = pick.choice(tensors)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values += np.asarray(1, values.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    run.save_graph(model)


def a_node_of_the_graph(run: Run, pick: random.Random) -> None:
    """One that is passed over: what reads its output reads its input."""
    model = run.graph()
    nodes = [n for n in model.graph.node if n.op_type in ("Cast", "Add", "Mul", "Sub")]
    dropped = pick.choice(nodes)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == dropped.output[0]:
                node.input[i] = dropped.input[0]
    model.graph.node.remove(dropped)
    run.save_graph(model)


def constants_in_data_files(run: Run, pick: random.Random) -> None:
    """What no weight is made of, such as rotary caches."""
    path, at, values = _data(run, pick.choice([w for w in run.weights() if not w["made_of"]]))
    values[pick.randrange(len(values))] += values.dtype.type(pick.choice([0.5, 1e-3]))
    _poked(path, at, values.tobytes())


def the_weights_map(run: Run, pick: random.Random) -> None:
    """A map by which the changed bytes of a weight are right: as a constant, or made of other rows, or of more."""
    path = run.onnx / "weights-map.json"
    document = json.loads(path.read_text())
    plain = [w for w in document["weights"] if w["made_of"] and "quantized" not in w and w["dtype"] == "float32"]
    weight = pick.choice(plain)
    place, at, values = _data(run, weight)
    if pick.random() < 0.5:
        weight["made_of"] = []
        weight.pop("transposed", None)
        values *= np.float32(0.5)
    else:
        weight["plus"] = float(np.float32(weight.get("plus", 0.0) + 0.125))
        values += np.float32(0.125)
    _poked(place, at, values.tobytes())
    write_json(path, document)


def the_runtime_configuration(run: Run, pick: random.Random) -> None:
    path = run.onnx / "genai_config.json"
    document = json.loads(path.read_text())
    edit = pick.choice(
        [
            lambda: document["search"].update(temperature=9.5),
            lambda: document["model"].update(eos_token_id=7),
            lambda: document["model"]["decoder"]["session_options"].update(custom_ops_library="x.so"),
        ]
    )
    edit()
    write_json(path, document)


def a_graph_of_another_name(run: Run, pick: random.Random) -> None:
    """The right graph stays, and the runtime is told of another."""
    model = run.graph()
    model.graph.doc_string = "other"
    (run.onnx / "graph.dat").write_bytes(model.SerializeToString())
    path = run.onnx / "genai_config.json"
    path.write_text(path.read_text().replace('"model.onnx"', '"graph.dat"'))


# Each with words that the verdict has where neither base nor adapter was given, if the forgery is not noticed then.
KINDS: dict[Forger, str] = {
    one_number_of_a_weight: "the weights",
    most_rows_of_a_weight: "the weights",
    quantized_blocks: "its weights (quantized or not)",
    the_certificate: "the figures of the certificate",
    an_attribute_of_the_graph: "the ONNX graph",
    the_tokenizer: "tokenizer",
    the_manifest: "the manifest",
    onnx_numbers: "its weights (quantized or not)",
    the_chat_template: "chat template",
    the_generation_config: "generation config",
    scales_of_blocks: "its weights (quantized or not)",
    the_index: "index",
    a_constant_of_the_graph: "the ONNX graph",
    a_file_more: "every other file",
    the_base_in_place_of_a_weight: "the weights",
    the_weights_map: "weights-map.json",
    the_config: "config.json",
    a_node_of_the_graph: "the ONNX graph",
    constants_in_data_files: "its weights (quantized or not)",
    the_runtime_configuration: "the runtime's configuration",
    rows_exchanged: "the weights",
    onnx_between_the_weights: "its weights (quantized or not)",
    the_export_record: "export.json",
    a_graph_of_another_name: "the runtime's configuration",
}
SEEDS = range(2 * len(KINDS) + 2)


def forger_of(seed: int) -> Forger:
    return list(KINDS)[seed % len(KINDS)]


def forge(run: Run, seed: int) -> str:
    """Forge a run and seal it anew; the words for what is not known of it without base and adapter."""
    forger = forger_of(seed)
    forger(run, random.Random(seed))
    run.reseal()
    return KINDS[forger]
