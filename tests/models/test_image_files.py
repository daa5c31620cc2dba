import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.error import HTTPError

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from hf_thinkingvit.data import decode
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.image_files import as_rgb, read_image
from tests.utils import lively_model


GREY = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
WIDE = GREY.astype(np.uint16) * 257  # the same picture in 16 bits


def files(folder) -> dict:
    """The picture in 16 bits, in every format that Pillow writes, and the same in 8 bits."""
    wide = Image.fromarray(WIDE)
    assert wide.mode == "I;16"
    paths = {suffix: folder / f"wide.{suffix}" for suffix in ("png", "tif", "pgm", "jp2")}
    for path in paths.values():
        wide.save(path, **({"irreversible": False} if path.suffix == ".jp2" else {}))
    paths["compressed tif"] = folder / "compressed.tif"
    wide.save(paths["compressed tif"], compression="tiff_adobe_deflate")
    return paths


@pytest.mark.parametrize("name", ["png", "tif", "compressed tif", "pgm", "jp2"])
def test_16_bits_are_scaled(name, tmp_path):
    found = read_image(files(tmp_path)[name])
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_values_between_two_of_8_bits_are_rounded(mode):
    image = Image.frombytes(
        mode, (4, 1), np.array([0, 128, 129, 65535], dtype=">u2" if "B" in mode else "<u2").tobytes()
    )
    assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_upright_as_other_images():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90°
    for values in (GREY, WIDE):
        file = BytesIO()
        Image.fromarray(values).save(file, "png", exif=exif)
        assert np.array_equal(np.asarray(as_rgb(Image.open(file)))[..., 0], np.rot90(GREY, -1))


def test_tiff_of_12_bits_and_tiff_whose_white_is_0(tmp_path):
    values = np.array([[0, 4095]], dtype=np.uint16)
    tiff = tmp_path / "a.tif"
    Image.fromarray(values * 16).save(tiff, tiffinfo={262: 0})
    assert np.asarray(read_image(tiff))[0, :, 0].tolist() == [255, 0]
    # Pillow cannot write 12-bit TIFF files. Two pixels take three bytes.
    entries = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (278, 4, 1), (279, 4, 3)]
    offset = 8 + 2 + 12 * len(entries) + 4
    content = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, kind, value in entries:
        value = offset if tag == 273 else value
        content += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
        content += value.to_bytes(4, "little")
    tiff.write_bytes(content + bytes(4) + bytes([0x00, 0x0F, 0xFF]))
    assert np.asarray(read_image(tiff))[0, :, 0].tolist() == [0, 255]


def test_refuses_values_of_unknown_range(tmp_path):
    for name, values in {"float.tif": GREY.astype(np.float32), "integer.tif": GREY.astype(np.int32)}.items():
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} has grey values of unknown range \(mode '[FI]'\): scale them"):
            read_image(tmp_path / name)
        row = {"path": name, "bytes": (tmp_path / name).read_bytes()}
        with pytest.raises(ValueError, match=f"{name} has grey values"):
            decode(row)
    with pytest.raises(ValueError, match="without a name has grey values"):
        as_rgb(Image.new("L", (2, 2)).convert("I"))


def test_other_sources(tmp_path):
    """The sources that `load_image` accepts; anything else is said to be missing."""
    path = files(tmp_path)["png"]
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (str(path), Image.open(path), text, f"data:image/png;base64,{text}"):
        assert np.array_equal(np.asarray(read_image(source))[..., 0], GREY)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = Image.effect_noise((8, 8), 50).convert(mode)
        assert np.array_equal(np.asarray(read_image(image)), np.asarray(image.convert("RGB")))
    with pytest.raises(ValueError, match="There is no file .*absent.png"):
        read_image(tmp_path / "absent.png")


def test_urls(tmp_path):
    files(tmp_path)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(read_image(f"{address}/wide.png", timeout=10))[..., 0], GREY)
        with pytest.raises(HTTPError, match="404"):
            read_image(f"{address}/absent.png", timeout=10)
        server.shutdown()


def test_every_way_in_reads_the_same_picture(tmp_path):
    """Engine, adaptive pipeline and data sets give the same answers for 16 bits as for 8."""
    model, processor = lively_model(num_hidden_layers=1), evaluation_image_processor(32)
    wide, narrow = files(tmp_path)["png"], tmp_path / "narrow.png"
    Image.fromarray(GREY).save(narrow)
    engine = AdaptiveEngine(model, processor, batch_size=2)
    first, second = engine([wide, narrow])
    assert first.logits.tolist() == pytest.approx(second.logits.tolist(), abs=1e-5)
    classifier = pipeline("adaptive-image-classification", model=model, image_processor=processor)
    first, second = (classifier(str(path)) for path in (wide, narrow))
    assert [answer["label"] for answer in first] == [answer["label"] for answer in second]
    assert first[0]["score"] == pytest.approx(second[0]["score"], abs=1e-6)
    rows = datasets.Dataset.from_dict({"image": [str(wide), str(narrow)]}).cast_column(
        "image", datasets.Image(decode=False)
    )
    first, second = (decode(row["image"]) for row in rows)
    assert np.array_equal(np.asarray(first), np.asarray(second))
