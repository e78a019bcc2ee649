"""Pipelines of diffusers: each component planned and merged as a model of its own, the rest copied."""
