"""Quantized exports: which weights, to which numbers, by which operators."""
