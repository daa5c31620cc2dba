"""A published demo holds the package and the pixels of its samples, and nothing else that lies beside them."""

from PIL import Image

import hf_thinkingvit.hub.space as space


GPS_INFO, ARTIST = 0x8825, 0x013B


def test_samples_lose_what_is_not_pixels(tmp_path):
    exif = Image.Exif()
    exif[ARTIST] = "somebody"
    exif[GPS_INFO] = {1: "N", 2: (52.0, 31.0, 0.0)}
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 4), "red").save(tmp_path / "photo.jpg", exif=exif)
    folder = space.push_space("you/demo", ["you/model"], samples=[tmp_path / "photo.jpg"], dry_run=tmp_path / "page")
    with Image.open(folder / "images/photo.jpg") as image:
        assert image.size == (4, 8) and not image.getexif()
    assert b"somebody" not in (folder / "images/photo.jpg").read_bytes()


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
