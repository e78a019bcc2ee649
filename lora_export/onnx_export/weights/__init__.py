"""The numbers of an export: weights-map.json, and data files filled as it says."""
