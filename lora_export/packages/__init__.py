"""Packages for production runtimes: one file a target; what all of them hold lies beside it."""
