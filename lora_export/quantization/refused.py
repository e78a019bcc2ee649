"""Formats that are known and not read: what each is, and what to give instead."""

ORIGINAL = "give the unquantized base model that this one was made from as -b"

# The method that config.json names → what its weights are.
REFUSED = {
    "aqlm": "AQLM: sums of vectors out of codebooks that its own GPU kernels read",
    "vptq": "VPTQ: indices into codebooks of vectors, permuted and with residuals",
    "spqr": "SpQR: groups whose scales are themselves quantized, beside a sparse matrix of outliers",
    "higgs": "HIGGS: weights turned by Hadamard matrices and put on a grid, laid out for one kind of GPU",
    "exl2": "EXL2: ExLlamaV2's rows of mixed bits, in the order of its own kernels",
    "exl3": "EXL3: ExLlamaV3's trellis codes of turned weights",
    "quip": "QuIP#: weights turned by Hadamard matrices and put on the E8 lattice",
    "quip_sharp": "QuIP#: weights turned by Hadamard matrices and put on the E8 lattice",
    "quark": "AMD Quark: a family of formats, of which config.json does not say enough without its library",
    "eetq": "EETQ: int8 whose rows and bytes were moved about for the kernels of one generation of GPUs",
    "fp_quant": "FP-Quant: 4-bit floats of weights turned by Hadamard matrices",
    "fouroversix": "Four Over Six: 4-bit floats with two scales to choose from for each block",
    "sinq": "SINQ: integers with a scale for each row and each column",
}
