"""The proof of an export: its graphs beside the model of transformers that they are made from.

`process.py` runs in the engines' own process. A battery (`single.py`, `decoder.py`, `seq2seq.py`) yields trials,
each a run of a graph and what PyTorch computes for the same inputs; `judge.py` says which of them differ too much,
and `first_module.py` which module of PyTorch is the first that a wrong graph does not compute.
"""
