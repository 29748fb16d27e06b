"""The seven tasks of `evaluate_3shot.py`: a YAML a task, and what reads them."""
