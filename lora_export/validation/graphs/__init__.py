"""Exported graphs held against the model that they were made of."""
