"""Running graphs with ONNX Runtime: what a graph reads and returns, feeds for it, and steps that continue its
cache."""
