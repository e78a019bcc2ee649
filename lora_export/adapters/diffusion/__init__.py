"""Adapters of image models: their files, names and kinds."""
