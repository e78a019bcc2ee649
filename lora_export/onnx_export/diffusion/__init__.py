"""Pipelines of diffusers: which of their models become graphs, and a folder of exports for each pipeline."""
