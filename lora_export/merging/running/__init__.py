"""A plan carried out: tensors read, computed, rounded once, and computed again in float64."""
