"""What a model's class says of a base, asked of transformers on the meta device."""
