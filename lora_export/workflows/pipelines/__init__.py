"""Jobs on pipelines of images: a validation, an export, a whole run, a package, from beginning to end."""
