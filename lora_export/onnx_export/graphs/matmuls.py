"""Which nodes of a graph multiply by a weight that can be quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.onnx_export.weights.map import Weight

SOURCES = ("MatMul", "FusedMatMul", "Gemm", "Gather")
FEW_ROWS = 64  # of a lookup table: kinds of tokens, buckets of distances; they weigh nothing and each is read often
FEW_COLUMNS = 32  # of a product: the classes of a head weigh nothing either
_PASSING = frozenset({"Add", "Cast", "Identity", "Mul", "Reshape", "Sigmoid", "Softmax", "Sqrt", "Softplus", "Sub"})


@dataclass(frozen=True)
class Product:
    """The factor of a node, or its lookup table: `weight`, or its transpose if turned. rows, columns: in, out."""

    weight: Weight
    turned: bool
    lookup: bool = False

    @property
    def rows(self) -> int:
        return self.weight.shape[self.turned]

    @property
    def columns(self) -> int:
        return self.weight.shape[not self.turned]

    @property
    def tensors(self) -> frozenset[str]:
        """The checkpoint tensors that the weight is made of."""
        return frozenset(piece.tensor for piece in self.weight.recipe.pieces)


def candidates(model: ir.Model, weights: Sequence[Weight], lookups: bool = False) -> dict[str, Product]:
    """Node name → its factor, for every node that could be quantized. lookups: also those of embeddings."""
    known = {w.name: w for w in weights}
    products: dict[str, Product] = {}
    ways: dict[str, bool] = {}
    for node in model.graph:
        product = _product(node, known, lookups)
        if product is None or not _fits(product) or _is_choice(node, product):
            continue
        # A weight that is read both ways would have two quantized forms; it gets the first.
        if ways.setdefault(product.weight.name, product.turned) == product.turned:
            products[str(node.name)] = product
    return products


def _product(node: ir.Node, known: Mapping[str, Weight], lookups: bool) -> Product | None:
    if node.op_type not in SOURCES or len(node.inputs) < 2:
        return None
    value = node.inputs[0 if node.op_type == "Gather" else 1]
    weight = known.get(str(value.name)) if value is not None else None
    if weight is None or len(weight.shape) != 2:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "MatMul":
        return Product(weight, turned=False)
    if node.op_type == "Gemm":  # with a bias, on inputs of two dimensions: GPT-2's layers
        turned = attributes.pop("transB", 0) == 1
        plain = all(attributes.pop(scale, 1.0) == 1.0 for scale in ("alpha", "beta"))
        return Product(weight, turned) if plain and not any(attributes.values()) else None
    if node.op_type == "FusedMatMul":  # a head that shares its weight with the embeddings
        plain = attributes.pop("alpha", 1.0) == 1.0 and attributes.pop("transB", 0) == 1
        return Product(weight, turned=True) if plain and not any(attributes.values()) else None
    if not lookups or weight.shape[0] < FEW_ROWS or attributes.get("axis", 0):
        return None
    return Product(weight, turned=True, lookup=True)


def _is_choice(node: ir.Node, product: Product) -> bool:
    """Whether the outputs are classes, or scores of experts: a rounded router sends tokens to other experts."""
    if product.lookup:
        return False
    return product.columns < FEW_COLUMNS or _reaches_choice(node, set())


def _reaches_choice(node: ir.Node, seen: set[ir.Node]) -> bool:
    """Whether the largest of the node's outputs are chosen, before anything multiplies by a weight."""
    for output in node.outputs:
        for reader, _ in output.uses():
            if reader.op_type == "TopK":
                return True
            if reader.op_type in _PASSING and reader not in seen:
                seen.add(reader)
                if _reaches_choice(reader, seen):
                    return True
    return False


def _fits(product: Product) -> bool:
    """Whether the writer can make the matrix a few columns at a time: it joins pieces along columns only."""
    recipe, dtype = product.weight.recipe, product.weight.dtype
    columnwise = recipe.transposed != product.turned or len(recipe.pieces) == 1
    return bool(recipe.pieces) and columnwise and not recipe.plus and dtype in ("float32", "float16", "bfloat16")
