"""Graphs under ONNX Runtime: what one reads and gives, feeds for it, and runs that continue its cache."""
