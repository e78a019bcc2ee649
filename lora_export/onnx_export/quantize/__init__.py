"""Quantized exports: which weights, into which numbers, with which operators."""
