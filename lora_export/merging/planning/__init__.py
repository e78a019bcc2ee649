"""What a merge will do, decided on headers alone: names, targets, ties, combinations."""
