"""What `evaluate_3shot.py` is made of: the models, the seven tasks, and the tables."""
