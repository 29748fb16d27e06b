"""``axolotl train`` where there is no GPU: with several processes it would put the model on GPU ``LOCAL_RANK``."""

import sys
from typing import Any

from axolotl.cli.train import do_cli
from axolotl.loaders.model import ModelLoader

places = ModelLoader._set_device_map_config


def on_the_cpu(self: Any) -> None:
    places(self)
    self.model_kwargs["device_map"] = "cpu"


ModelLoader._set_device_map_config = on_the_cpu

if __name__ == "__main__":
    do_cli(sys.argv[1])
