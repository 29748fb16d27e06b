"""How the Trainer of transformers drives it: names, arguments, logs, cards.

Written against the extension points of transformers 5 and accelerate 1, which each module names; what transformers 4.57
to 5.2 do otherwise is in ``transformers_versions``. Other versions are refused here rather than failing later.
"""

from transformers.utils.versions import require_version

for _requirement in ("transformers>=4.57,<6", "accelerate>=1.10,<2"):
    require_version(_requirement, "hf_dlion's Trainer is written for these versions.")
