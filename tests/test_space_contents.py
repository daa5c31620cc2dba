"""A published demo holds the package and the pixels of its samples, and nothing else that lies beside them."""

import numpy as np
import pytest
from PIL import Image

import hf_thinkingvit.hub.space as space
from hf_thinkingvit.models.image_files import read_image
from tests.utils import random_images


GPS_INFO, ARTIST = 0x8825, 0x013B


def test_samples_lose_what_is_not_pixels(tmp_path):
    exif = Image.Exif()
    exif[ARTIST] = "somebody"
    exif[GPS_INFO] = {1: "N", 2: (52.0, 31.0, 0.0)}
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 4), "red").save(tmp_path / "photo.jpg", exif=exif)
    folder = space.push_space("you/demo", ["you/model"], samples=[tmp_path / "photo.jpg"], dry_run=tmp_path / "page")
    with Image.open(folder / "images/photo.png") as image:
        assert image.size == (4, 8) and not image.getexif()
    assert b"somebody" not in (folder / "images/photo.png").read_bytes()


def test_the_page_sees_the_pixels_that_the_package_reads(tmp_path):
    """16 bits become 8 instead of white, and a JPEG file is not compressed a second time."""
    noise = (random_images(1)[0].sigmoid() * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)).save(tmp_path / "ramp.png")
    samples = [tmp_path / "noise.jpg", tmp_path / "ramp.png"]
    folder = space.push_space("you/demo", ["you/model"], samples=samples, dry_run=tmp_path / "page")
    for sample in samples:
        published = read_image(folder / "images" / f"{sample.stem}.png")
        np.testing.assert_array_equal(np.asarray(published), np.asarray(read_image(sample)))


def test_samples_of_one_name_are_refused(tmp_path):
    for name in ("one.jpg", "one.png"):
        Image.new("RGB", (8, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match="as PNG, and must have different names, got .*one.jpg, .*one.png"):
        space.push_space("you/demo", ["you/m"], samples=[tmp_path / "one.jpg", tmp_path / "one.png"], dry_run=tmp_path)


def test_only_the_package_is_published(tmp_path, monkeypatch):
    package = tmp_path / "hf_thinkingvit"
    (package / "models").mkdir(parents=True)
    for name in ("__init__.py", "models/a.py", "models/README.md", ".env", "models/key.pem", "weights.safetensors"):
        (package / name).write_text("content")
    (package / "link.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "elsewhere.py").write_text("secret")
    monkeypatch.setattr(space.hf_thinkingvit, "__file__", str(package / "__init__.py"))
    folder = space.push_space("you/demo", ["you/model"], dry_run=tmp_path / "page")
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in held if name.startswith("hf_thinkingvit/")} == {
        "hf_thinkingvit/__init__.py",
        "hf_thinkingvit/models/a.py",
        "hf_thinkingvit/models/README.md",
    }
