"""What transformers says of a base's class, on the meta device, and of the tensors on disk that fill it."""
