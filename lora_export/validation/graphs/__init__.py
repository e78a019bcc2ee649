"""Compares exported graphs with the model they were made of."""
