"""What can be done with the changes that adapters make to a weight: mixed, pruned, made smaller, measured.

All of it is about matrices in float64. Nothing here knows of files, adapters or models.
"""
