"""The parts of a package for MLflow: the code that it loads, and the documents that it reads."""
