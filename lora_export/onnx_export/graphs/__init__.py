"""ONNX graphs: checked, compared, and written."""
