"""torch.onnx.export(dynamo=True) on models without weights: what is traced, how the graph is fused and written."""
