"""What a model sees of an image: for training a random part of it, for testing always the same."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset
from transformers import ViTImageProcessorPil

from .image_data import ImageData, Split
from .image_partition import Draw, WorkerBatchSampler

# Up to this size images are padded and cropped, as is usual for CIFAR; above it, scaled and cropped as for ImageNet.
SMALL = 64
LARGE = 224
_RESIZED_FOR_TESTING = 256 / 224
_KEPT_BYTES = 2**30
_AREA, _ASPECT, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

Pixels = NDArray[np.uint8]
"""[height, width, 3 colours]"""


def image_size(data: ImageData) -> int:
    """Height and width for the model: those of the data where they are small."""
    size = min(data.train.images[0].size)
    return size if size <= SMALL else LARGE


class TestImages(Dataset[dict[str, Any]]):
    """Images as they are tested: whole where they are small, otherwise the middle."""

    __test__ = False  # no tests, whatever pytest reads from the name

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size
        # [images, height, width, 3]: decoding costs more than the rest
        self._kept: Pixels | None = None
        if size <= SMALL and len(split.labels) * 3 * size**2 <= _KEPT_BYTES:
            self._kept = np.stack([self._decoded(index) for index in range(len(split.labels))])

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels(index), "labels": self.split.labels[index]}

    def pixels(self, index: int) -> Pixels:
        return self._decoded(index) if self._kept is None else self._kept[index]

    def _decoded(self, index: int) -> Pixels:
        image = self.split.images[index].convert("RGB")
        return np.asarray(_whole(image, self.size) if self.size <= SMALL else _middle(image, self.size))


class TrainImages(Dataset[dict[str, Any]]):
    """Images as they are trained on, by `Draw`: cropped and, where that keeps the class, mirrored at random.

    What is random depends on the seed and the draw alone, so it is the same in whichever process it happens.
    """

    def __init__(self, data: ImageData, size: int, seed: int, batches: WorkerBatchSampler) -> None:
        self.whole = TestImages(data.train, size)
        self.mirrored, self.seed, self.batches = data.mirrored, seed, batches

    def __len__(self) -> int:
        return len(self.whole)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader, which does not reach a batch sampler in all of its wrappings."""
        self.batches.set_epoch(epoch)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        random = np.random.default_rng((self.seed, *draw))
        split, size = self.whole.split, self.whole.size
        if size <= SMALL:
            pixels = _shifted(self.whole.pixels(draw.image), size // 8, random)
        else:
            pixels = np.asarray(_random_part(split.images[draw.image].convert("RGB"), size, random))
        if self.mirrored and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return {"pixel_values": pixels, "labels": split.labels[draw.image]}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: pixels of [items, 3, height, width] from -1 to 1, and classes."""
    pixels = torch.from_numpy(np.stack([item["pixel_values"] for item in items]))
    scaled = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    return {"pixel_values": scaled, "labels": torch.tensor([item["labels"] for item in items])}


def image_processor(size: int) -> ViTImageProcessorPil:
    """Does to an image what `TestImages` and `collate` do; saved with the model."""
    if size <= SMALL:
        return ViTImageProcessorPil(size={"height": size, "width": size}, do_convert_rgb=True)
    shortest, crop = {"shortest_edge": round(size * _RESIZED_FOR_TESTING)}, {"height": size, "width": size}
    return ViTImageProcessorPil(size=shortest, do_center_crop=True, crop_size=crop, do_convert_rgb=True)


def _whole(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def _middle(image: Image.Image, size: int) -> Image.Image:
    scale = round(size * _RESIZED_FOR_TESTING) / min(image.size)
    width, height = (max(size, int(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def _shifted(pixels: Pixels, pad: int, random: np.random.Generator) -> Pixels:
    """Of the image with a black border of `pad` pixels, a part of the image's size."""
    height, width, _ = pixels.shape
    framed = np.zeros((height + 2 * pad, width + 2 * pad, 3), np.uint8)
    framed[pad : pad + height, pad : pad + width] = pixels
    top, left = random.integers(0, 2 * pad + 1, 2)
    return framed[top : top + height, left : left + width]


def _random_part(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """A part of 8 to 100 % of the area and an aspect of 3:4 to 4:3, at the size asked for (Szegedy et al. 2015)."""
    width, height = image.size
    for _ in range(_TRIES):
        area = width * height * random.uniform(*_AREA)
        aspect = np.exp(random.uniform(*np.log(_ASPECT)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
            return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return _middle(image, size)
