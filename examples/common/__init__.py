"""What the task scripts share: arguments, data, models, and the report of a run."""
