"""What a worker computes, and the update: optimizers, one file a method, and the registry of their names."""
