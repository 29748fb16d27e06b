"""Small images for the tests, in the layout that train_vit.py reads."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


def write_images(folder: Path, size: tuple[int, int] = (16, 16), train: int = 12, test: int = 4) -> Path:
    """Noisy images of one colour a class; PNG, so that pixels stay what they are."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{number:04}.png")
    return folder


def zip_splits(folder: Path, target: Path) -> Path:
    """One zip file a split."""
    target.mkdir()
    for split in ("train", "test"):
        with zipfile.ZipFile(target / f"{split}_images.zip", "w") as archive:
            for path in sorted((folder / split).rglob("*.png")):
                archive.write(path, path.relative_to(folder))
    return target
