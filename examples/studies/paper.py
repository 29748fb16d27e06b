"""What the paper (arXiv 2404.00438) gives for CIFAR-10: learning rates, weight decays, dropped shares."""

LION = {"learning_rate": 5e-5, "weight_decay": 5e-3}
ADAMW = {"learning_rate": 1e-4, "weight_decay": 5e-4}
PAPER: dict[str, dict[str, float]] = {
    **dict.fromkeys(("dlion_mavo", "dlion_avg", "dsignum_mavo", "dsignum_avg", "glion"), LION),  # Signum takes Lion's
    # Muon at AdamW's rms is not in the paper; it takes AdamW's.
    **dict.fromkeys(("gadamw", "gmuon", "dmuon_mavo", "dmuon_avg"), ADAMW),
    "terngrad": {"learning_rate": 1e-3, "weight_decay": 5e-4},
    "graddrop": {"learning_rate": 1e-3, "weight_decay": 5e-4, "drop_share": 0.96},
    "dgc": {"learning_rate": 1e-2, "weight_decay": 5e-4, "drop_share": 0.96},
}
