"""What an update costs: over the network, at the processor, and what the checks take of a training step."""
