"""Images by folder, zip file, hub dataset and scikit-learn; and what a model sees of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import DataError
from common.image_data import from_splits, load_image_data
from common.image_partition import Draw, WorkerBatchSampler
from common.image_views import TestImages, TrainImages, collate, image_processor, image_size
from tests.examples.images import CLASSES, write_images, zip_splits

ROOT = Path(__file__).parents[3]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10"


def load(path: Path | str) -> Any:
    return load_image_data(str(path), contextlib.nullcontext())


def train_images(data: Any, size: int, seed: int = 3) -> TrainImages:
    return TrainImages(data, size, seed, WorkerBatchSampler([np.arange(len(data.train.labels))], 4, seed))


def test_digits_are_whole_and_never_mirrored() -> None:
    data = load("digits")
    assert (len(data.train.labels), len(data.test.labels), len(data.classes)) == (1437, 360, 10)
    assert not data.mirrored
    assert image_size(data) == 8
    assert set(data.test.labels) == set(range(10))
    assert np.max([np.asarray(image) for image in data.train.images]) == 255


def test_folder_and_zip_files_give_the_same(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "folder")
    zips = zip_splits(folder, tmp_path / "zips")
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, Path("data") / path.relative_to(folder))
            archive.writestr(str(Path("__MACOSX", "data", path.relative_to(folder).with_name(f"._{path.name}"))), "")
    found = [load(path) for path in (folder, zips, whole)]
    for data in found:
        assert tuple(data.classes) == CLASSES
        assert (len(data.train.labels), len(data.test.labels)) == (36, 12)
        assert data.train.labels == found[0].train.labels
        for mine, first in zip(data.train.images, found[0].train.images, strict=True):
            assert np.array_equal(np.asarray(mine), np.asarray(first))
        for image, label in zip(data.test.images, data.test.labels, strict=True):
            assert np.asarray(image).mean((0, 1)).argmax() == 2 - label


def test_the_cifar_zip_files() -> None:
    if not CIFAR.is_dir():
        pytest.skip(f"needs the zip files of CIFAR-10 in {CIFAR}")
    data = load(CIFAR)
    assert (len(data.train.labels), len(data.test.labels), image_size(data)) == (10_000, 10_000, 32)
    assert data.classes[0] == "airplane"
    assert np.bincount(data.train.labels).tolist() == [1000] * 10
    assert TestImages(data.test, 32)[9_999]["labels"] == 9


def test_a_hub_dataset_by_the_types_of_its_columns() -> None:
    rows = {"picture": [Image.new("L", (8, 8), 40 * n) for n in range(6)], "kind": [0, 1] * 3, "id": list(range(6))}
    features = datasets.Features(
        picture=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b"]), id=datasets.Value("int64")
    )
    split = datasets.Dataset.from_dict(rows, features=features)
    data = from_splits("some/data", {"train": split, "test": split})
    assert (data.classes, data.train.labels) == (["a", "b"], [0, 1] * 3)
    assert TestImages(data.test, 8)[5]["pixel_values"].max() == 200
    with pytest.raises(DataError, match="expected the splits train and validation or val or test, found train"):
        from_splits("some/data", {"train": split})
    with pytest.raises(DataError, match="Image and one of type ClassLabel, found id .Value"):
        from_splits("some/data", {"train": split.select_columns(["id"]), "test": split})
    hidden = split.map(lambda row: {"kind": -1})
    with pytest.raises(DataError, match="6 images of its test split have no label"):
        from_splits("some/data", {"train": split, "test": hidden})
    assert from_splits("some/data", {"train": split, "validation": split, "test": hidden}).test.labels == [0, 1] * 3


def test_wrong_data_is_an_error_that_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere.zip: no such file or folder, seen from .* Give a folder or a zip"):
        load("nowhere.zip")
    flat = tmp_path / "flat"
    (flat / "cats").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(flat / "cats" / "1.png")
    with pytest.raises(DataError, match="The folders above those of classes are: flat"):
        load(flat)
    (tmp_path / "not.zip").write_text("no zip")
    with pytest.raises(DataError, match="not a zip file"):
        load(tmp_path / "not.zip")
    folder = write_images(tmp_path / "images")
    (folder / "test" / "red").rename(folder / "test" / "pink")
    with pytest.raises(DataError, match="test has classes that train has not: pink"):
        load(folder)
    (folder / "test" / "pink").rename(folder / "test" / "red")
    (folder / "test" / "red" / "0000.png").write_text("no image")
    with pytest.raises(DataError, match=r"test/red/0000.png .* is no image"):
        TestImages(load(folder).test, 16)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn, which brings it, is not installed"):
        load("digits")


@pytest.mark.parametrize("size", [(16, 16), (90, 70)], ids=["small", "large"])
def test_a_draw_decides_the_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    data = load(write_images(tmp_path, size, train=2, test=1))
    pixels = 16 if size[0] <= 64 else 66
    images = train_images(data, pixels)
    views = [images[Draw(1, passes)]["pixel_values"] for passes in range(40)]
    assert {view.shape for view in views} == {(pixels, pixels, 3)}
    np.random.seed(1)
    torch.manual_seed(1)
    again = [train_images(data, pixels)[Draw(1, passes)]["pixel_values"] for passes in reversed(range(40))]
    assert all(np.array_equal(a, b) for a, b in zip(views, reversed(again), strict=True))
    assert len({view.tobytes() for view in views}) > 20
    other = train_images(data, pixels, seed=4)
    assert any(not np.array_equal(view, other[Draw(1, n)]["pixel_values"]) for n, view in enumerate(views))


def test_small_images_are_shifted_by_up_to_an_eighth_and_mirrored() -> None:
    data = load("digits")
    images = train_images(data, 8)
    framed = np.pad(images.whole.pixels(7), ((1, 1), (1, 1), (0, 0)))
    shifts = [framed[top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    views = [images[Draw(7, passes)]["pixel_values"] for passes in range(200)]
    assert all(any(np.array_equal(view, shift) for shift in shifts) for view in views)
    assert len({view.tobytes() for view in views}) == 9
    images.mirrored = True
    views = [images[Draw(7, passes)]["pixel_values"] for passes in range(200)]
    mirrored = [not any(np.array_equal(view, shift) for shift in shifts) for view in views]
    assert 60 < sum(mirrored) < 140
    assert all(any(np.array_equal(view[:, ::-1], shift) for shift in shifts) for view in np.array(views)[mirrored])


@pytest.mark.parametrize(("stored", "size"), [((16, 16), 16), ((20, 24), 16), ((300, 260), 112)])
def test_the_saved_image_processor_does_what_the_test_images_are(
    stored: tuple[int, int], size: int, tmp_path: Path
) -> None:
    data = load(write_images(tmp_path, stored, train=1, test=1))
    mine = collate([TestImages(data.test, size)[0]])["pixel_values"]
    theirs = image_processor(size)(data.test.images[0], return_tensors="pt")["pixel_values"]
    assert mine.shape == theirs.shape == (1, 3, size, size)
    assert (mine - theirs).abs().max() < 0.02
    assert mine.abs().max() <= 1


def mean_pixel(images: TestImages, index: int) -> float:
    return float(images[index]["pixel_values"].mean())


def test_a_forked_process_reads_the_same_zip_file(tmp_path: Path) -> None:
    data = load(zip_splits(write_images(tmp_path / "folder", (80, 80)), tmp_path / "zips"))
    images = TestImages(data.train, 72)
    expected = [mean_pixel(images, index) for index in range(36)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(mean_pixel, [(images, index) for index in range(36)] * 3, chunksize=1)
    assert found == expected * 3
