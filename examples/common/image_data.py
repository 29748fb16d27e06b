"""Images with classes: scikit-learn's digits, a folder or zip files of images, or a dataset of the hub."""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .errors import DataError, reason

EMBEDDED = "digits"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# ImageNet's `test` on the hub has no labels, so `validation` goes first.
TEST_SPLITS = ("validation", "val", "test")
_DIGITS_FOR_TESTING = 360
_LAYOUT = "train/CLASS/NAME.jpg and test/CLASS/NAME.jpg (or validation/, val/)"


@dataclass(frozen=True)
class Split:
    """Images, decoded at each access, and the number of each one's class."""

    images: Sequence[Image.Image]
    labels: list[int]


@dataclass(frozen=True)
class ImageData:
    name: str
    train: Split
    test: Split
    classes: list[str]
    mirrored: bool = True
    """Whether an image and its mirror image are of one class."""


def load_image_data(dataset: str, main_process_first: AbstractContextManager) -> ImageData:
    """The images that `--dataset` names.

    Args:
        dataset: `digits`, a folder, a zip file, or a hub id.
        main_process_first: in it, a hub dataset is downloaded.

    Raises:
        DataError: there is no such data, or no splits, images or classes can be found in it.
    """
    path = Path(dataset)
    if dataset == EMBEDDED:
        return _digits()
    if path.exists():
        return _local(path)
    if path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1 or path.suffix == ".zip":
        raise DataError(
            f"--dataset {dataset}: no such file or folder, seen from {Path.cwd()}. Give a folder or a zip file with "
            f"{_LAYOUT}, a hub id such as uoft-cs/cifar10, or '{EMBEDDED}'."
        )
    with main_process_first:
        return _hub(dataset)


def _digits() -> ImageData:
    """1,797 handwritten digits of 8 x 8 pixels; the last 360 are for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"--dataset {EMBEDDED}: scikit-learn, which brings it, is not installed. `pip install 'hf-dlion[vision]'`, "
            "or give a folder, a zip file or a hub id."
        ) from error
    found = load_digits()
    images = [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in found.images]
    labels = [int(label) for label in found.target]
    cut = len(images) - _DIGITS_FOR_TESTING
    train, test = Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])
    return ImageData(EMBEDDED, train, test, [str(digit) for digit in range(10)], mirrored=False)


@dataclass(frozen=True)
class _File:
    path: Path
    member: str | None = None
    """In the zip file at `path`."""

    @property
    def parts(self) -> tuple[str, ...]:
        return self.path.parts if self.member is None else Path(self.member).parts

    def read(self) -> bytes:
        if self.member is None:
            return self.path.read_bytes()
        return _open_zip(self.path, os.getpid()).read(self.member)


@lru_cache(maxsize=16)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    # One a process: a file position that was inherited from the parent is shared with it.
    return zipfile.ZipFile(path)


class _Files(Sequence[Image.Image]):
    def __init__(self, files: list[_File]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        file = self.files[index]
        try:
            return Image.open(io.BytesIO(file.read()))
        except OSError as error:
            raise DataError(f"--dataset: {'/'.join(file.parts)} of {file.path} is no image: {error}.") from error


def _local(path: Path) -> ImageData:
    files = _zipped(path) if path.is_file() else _in_folder(path)
    by_split: dict[str, list[_File]] = {}
    for file in files:
        hidden = any(part == "__MACOSX" or part.startswith(".") for part in file.parts[-3:])
        if len(file.parts) > 2 and file.parts[-1].lower().endswith(IMAGE_SUFFIXES) and not hidden:
            by_split.setdefault(file.parts[-3].lower(), []).append(file)
    test = next((name for name in TEST_SPLITS if name in by_split), None)
    if "train" not in by_split or test is None:
        found = ", ".join(sorted(by_split)) or f"none, in {len(files)} files"
        raise DataError(
            f"--dataset {path}: expected images at {_LAYOUT}, in the folder or in zip files. The folders above those "
            f"of classes are: {found}."
        )
    classes = sorted({file.parts[-2] for file in by_split["train"]})
    if unknown := {file.parts[-2] for file in by_split[test]} - set(classes):
        raise DataError(f"--dataset {path}: {test} has classes that train has not: {', '.join(sorted(unknown))}.")
    return ImageData(str(path), _labelled(by_split["train"], classes), _labelled(by_split[test], classes), classes)


def _labelled(files: list[_File], classes: list[str]) -> Split:
    numbers = {name: number for number, name in enumerate(classes)}
    return Split(_Files(files), [numbers[file.parts[-2]] for file in files])


def _in_folder(folder: Path) -> list[_File]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    zips = [path for path in found if path.suffix.lower() == ".zip"]
    return [_File(path) for path in found if path not in zips] + [file for path in zips for file in _zipped(path)]


def _zipped(path: Path) -> list[_File]:
    try:
        return [_File(path, name) for name in sorted(_open_zip(path, os.getpid()).namelist())]
    except zipfile.BadZipFile as error:
        raise DataError(
            f"--dataset {path}: not a zip file ({error}). Give a folder or a zip file with {_LAYOUT}."
        ) from error


class _Column(Sequence[Image.Image]):
    def __init__(self, rows: datasets.Dataset, name: str) -> None:
        self.rows, self.name = rows.select_columns([name]), name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index][self.name]


def _hub(dataset: str) -> ImageData:
    try:
        splits = datasets.load_dataset(dataset)
    except Exception as error:  # the hub's client has a different class for each of the many ways to fail
        raise DataError(
            f"--dataset {dataset}: no file or folder of that name here, and loading it from the hub failed: "
            f"{reason(error)}. Give a path, a hub id that can be loaded from here, or '{EMBEDDED}', which needs no "
            "network."
        ) from error
    return from_splits(dataset, splits)


def from_splits(name: str, splits: dict[str, datasets.Dataset]) -> ImageData:
    """Images and classes from the first columns of the types `Image` and `ClassLabel`."""
    test = next((split for split in TEST_SPLITS if split in splits), None)
    if "train" not in splits or test is None:
        raise DataError(
            f"--dataset {name}: expected the splits train and {' or '.join(TEST_SPLITS)}, found {', '.join(splits)}."
        )
    features = splits["train"].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        found = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in features.items())
        raise DataError(f"--dataset {name}: needs a column of type Image and one of type ClassLabel, found {found}.")
    train, held_out = (Split(_Column(splits[key], image), list(splits[key][label])) for key in ("train", test))
    if absent := Counter(held_out.labels)[-1]:
        raise DataError(f"--dataset {name}: {absent} images of its {test} split have no label.")
    return ImageData(name, train, held_out, list(features[label].names))
