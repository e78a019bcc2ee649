"""Programs that Triton's Python backend runs, copied into packages as they stand here.

They import nothing of this project: in the server there are only onnxruntime, tokenizers and numpy. `onnx_session`
lies beside each model.py, where the backend finds it.
"""
