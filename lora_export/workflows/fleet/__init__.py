"""A fleet from its jobs file to its report."""
