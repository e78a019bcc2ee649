"""Jobs that join rooms, for pipelines of diffusers."""
