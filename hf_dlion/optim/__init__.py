"""What a worker computes, and the update: optimizers, one file a method, on what all of them share."""
