"""What travels: collectives, conversations, exchanges, and the ledger that counts the bytes.

Tensors in, tensors out. This layer knows ``torch.distributed``; it knows no optimizer and no Trainer.
"""
