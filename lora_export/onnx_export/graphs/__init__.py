"""ONNX graphs: checked, compared, fed and run."""
