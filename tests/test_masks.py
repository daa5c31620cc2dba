"""Masks are read strictly: every value is a class, is said to be ignored, or is an error that names it."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit.masks import MaskLabels, as_mask_split, load_mask_folders, read_label_names, read_mask_values
from tests.segmentation_data import CLASSES, encoded, picture


LABELS = MaskLabels(tuple(CLASSES), (0, 1, 2))
IMAGE = Image.new("RGB", (3, 2))


def decode(pixels, labels=LABELS, image=IMAGE):
    return labels.decode(encoded(pixels), image, "a.png")


def test_values_become_classes():
    assert decode(np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)).tolist() == [[0, 1, 2], [255, 2, 0]]
    ade = MaskLabels(("wall", "sky"), (1, 2), ignored=(0,))
    assert decode(np.array([[0, 1, 2], [2, 0, 0]], dtype=np.uint8), ade).tolist() == [[255, 0, 1], [1, 255, 255]]
    wide = MaskLabels(("a", "b"), (7, 40000), ignored=(), ignore_index=-100)
    assert decode(np.array([[7, 40000, 7], [7, 7, 7]], dtype=np.uint16), wide).tolist() == [[0, 1, 0], [0, 0, 0]]


def test_a_palette_gives_its_indices():
    palette = Image.fromarray(np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8))
    palette.putpalette([value for index in range(256) for value in (255 - index, 7, index)])
    assert palette.mode == "P"
    assert decode(palette).tolist() == [[0, 1, 2], [255, 2, 0]]


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.zeros((2, 4), dtype=np.uint8), r"mask of image a.png has 4 × 2 pixels, the image 3 × 2"),
        (np.zeros((2, 3, 3), dtype=np.uint8), r"mask of image a.png has colours .*mode 'RGB'"),
        (
            np.array([[0, 9, 2], [9, 11, 0]], dtype=np.uint8),
            r"mask of image a.png has values .*: \[9, 11\] in 3 pixels, the first at row 0, column 1. The classes are "
            "0-2, ignored is 255",
        ),
    ],
)
def test_what_is_no_mask_is_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        decode(pixels)


def test_values_of_32_bits_are_not_taken_for_others():
    pixels = Image.fromarray(np.array([[0, 1, 65536 + 1], [0, 0, 0]], dtype=np.int32))
    with pytest.raises(ValueError, match=r"\[65537\] in 1 pixels"):
        LABELS.decode({"bytes": _tiff(pixels), "path": None}, IMAGE, "a.tif")


def _tiff(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "values, ignored, message",
    [((0, 1), (255,), "3 classes, but 2 values"), ((0, 1, 255), (255,), r"several meanings: \[255\]")],
)
def test_values_have_one_meaning(values, ignored, message):
    with pytest.raises(ValueError, match=message):
        MaskLabels(tuple(CLASSES), values, ignored)
    with pytest.raises(ValueError, match="both a class and"):
        MaskLabels(tuple(CLASSES), (0, 1, 2), ignore_index=1)


def test_names_and_values_from_words_and_files(tmp_path):
    (tmp_path / "names.txt").write_text("dark\ngrey\n\nlight\n")
    (tmp_path / "names.json").write_text('{"1": "grey", "0": "dark", "2": "light"}')
    (tmp_path / "broken.json").write_text('{"1": "grey"}')
    for words in (CLASSES, [str(tmp_path / "names.txt")], [str(tmp_path / "names.json")]):
        assert read_label_names(words) == tuple(CLASSES)
    with pytest.raises(ValueError, match="must hold a JSON list"):
        read_label_names([str(tmp_path / "broken.json")])
    assert read_mask_values(["1-3", "7"]) == (1, 2, 3, 7)
    with pytest.raises(ValueError, match="numbers or ranges such as 1-150, got '3-1'"):
        read_mask_values(["3-1"])


def write_cities(folder):
    for split, city, count in (("train", "aachen", 2), ("train", "bochum", 1), ("val", "lindau", 1)):
        for number in range(count):
            image, mask = picture(number)
            for tree, suffix, pixels in (("left", "left", image), ("fine", "labelIds", mask)):
                path = folder / tree / split / city / f"{city}_{number}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


def test_folders_of_images_and_masks(tmp_path):
    patterns = "left/{split}/*/*_left.png", "fine/{split}/*/*_labelIds.png"
    splits = load_mask_folders(write_cities(tmp_path), *patterns)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "val": 1}
    split = as_mask_split(splits["train"], "cities", LABELS)
    for row in split.rows:
        image, mask = row["image"]["path"], row["annotation"]["path"]
        assert mask == image.replace("/left/", "/fine/").replace("_left.png", "_labelIds.png")
    (tmp_path / "fine/train/bochum/bochum_0_labelIds.png").unlink()
    with pytest.raises(ValueError, match="1 of the 4 images .* have no mask .* bochum_0_left.png|bochum_0_left.png"):
        load_mask_folders(tmp_path, *patterns)
    with pytest.raises(ValueError, match="has no images"):
        load_mask_folders(tmp_path, "nowhere/{split}/*.jpg", patterns[1])
    with pytest.raises(ValueError, match=r"must have `\{split\}` once"):
        load_mask_folders(tmp_path, "left/*.png", patterns[1])


def test_columns_are_found_by_type_and_name():
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(), "id": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"photo": [], "mask": [], "id": []}, features=features)
    split = as_mask_split(rows, "scenes", LABELS)
    assert (split.image_column, split.label_column, split.label_names) == ("photo", "mask", CLASSES)
    with pytest.raises(ValueError, match="no column for `label_column`"):
        as_mask_split(rows.remove_columns("mask"), "scenes", LABELS)


def test_masks_keep_their_dtype_small():
    assert decode(np.zeros((2, 3), dtype=np.uint8)).dtype == torch.uint8
