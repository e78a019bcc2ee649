"""Python imports this at its start where this folder is on PYTHONPATH: child processes get the played CUDA, too."""

import os

import played

if played.VARIABLE in os.environ:
    played.on_import()
