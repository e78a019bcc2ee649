"""Jobs on pipelines of diffusers that join rooms."""
