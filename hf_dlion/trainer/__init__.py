"""How Hugging Face drives it: training arguments, Trainer, and local gradients.

Written against transformers 5 and accelerate 1.15, on the extension points that each module names.
"""
