"""Checkpoints with the state of every worker, that are whole or do not count."""
