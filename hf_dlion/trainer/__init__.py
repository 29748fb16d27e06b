"""How Hugging Face drives it: training arguments, Trainer, and local gradients.

Written against the extension points of transformers 5 and accelerate 1, which each module names; other major versions
are refused here rather than failing later.
"""

from transformers.utils.versions import require_version

for _requirement in ("transformers>=5.0,<6", "accelerate>=1.15,<2"):
    require_version(_requirement, "hf_dlion's Trainer is written for these versions.")
