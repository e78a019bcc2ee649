"""Faults of an exporter, put into the graphs of tiny models, and honest exports beside them."""
