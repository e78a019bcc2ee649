"""Packages of pipelines of diffusers: what draws the picture that proves them, and the files that they hold."""
