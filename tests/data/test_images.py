"""Images are prepared as the reference library prepares them, and what is no image is refused."""

from __future__ import annotations

import contextlib
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyformer.data.images import PIXELS, ImageReader, open_image
from polyformer.errors import DataError, SpecError

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed (the extra 'images')")
transformers = pytest.importorskip("transformers")


def picture(width: int, height: int, mode: str = "RGB") -> Any:
    """Return a random picture with coarse and fine structure."""
    chance = np.random.default_rng(width * 1000 + height)
    channels = len(mode) if mode in ("RGB", "RGBA") else 1
    coarse = chance.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels)).repeat(8, 0).repeat(8, 1)
    noisy = (coarse[:height, :width] * 3 + chance.integers(0, 256, (height, width, channels))) // 4
    return pillow.fromarray(noisy.astype(np.uint8).squeeze(-1) if channels == 1 else noisy.astype(np.uint8))


def processor(kind: str, folder: Path, **changes: Any) -> Any:
    """Return the reference's image processor, saved in a folder."""
    made = getattr(transformers, f"{kind}ImageProcessorPil")(**changes)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("size", [(224, 224), (100, 60), (301, 512), (40, 300)], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ViT", {}),
        ("ViT", {"size": {"height": 50, "width": 31}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}),
        ("ViT", {"size": {"shortest_edge": 64}, "resample": 1}),
        ("ViT", {"do_resize": False, "do_rescale": False, "image_std": [10.0, 20.0, 30.0]}),
        ("ViT", {"do_normalize": False, "resample": 4, "rescale_factor": 0.01}),
        ("DeiT", {}),
        ("DeiT", {"size": {"height": 30, "width": 45}, "crop_size": {"height": 41, "width": 38}, "resample": 0}),
        ("DeiT", {"do_resize": False, "crop_size": {"height": 97, "width": 64}}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "defaults",
)
def test_the_reference_s_pixels(kind: str, changes: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    theirs = processor(kind, tmp_path, **changes)
    image = picture(*size)
    image.save(tmp_path / "picture.png")
    reader = ImageReader.find(tmp_path)
    assert reader is not None
    wanted = theirs(image, return_tensors="pt")["pixel_values"]
    found = reader.batch([tmp_path / "picture.png"])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    (tmp_path / "again").mkdir()
    reader.save(tmp_path / "again")
    assert ImageReader.find(tmp_path / "again") == reader
    again = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(tmp_path / "again")
    assert again(image, return_tensors="pt")["pixel_values"].equal(wanted)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "1", "CMYK"])
def test_other_colours(mode: str, tmp_path: Path) -> None:
    """Any picture becomes one of three channels; what shows through is white, as the reference does when asked to."""
    theirs = processor("ViT", tmp_path, do_convert_rgb=True)
    image = picture(60, 50, "RGBA" if mode == "RGBA" else "RGB").convert(mode)
    reader = ImageReader.find(tmp_path)
    assert reader is not None
    wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(reader.prepare(image), wanted, atol=1e-6, rtol=1e-6)
    if mode != "CMYK":
        image.save(tmp_path / "picture.png")
        torch.testing.assert_close(reader.read(tmp_path / "picture.png"), wanted, atol=1e-6, rtol=1e-6)


def test_grey_models() -> None:
    reader = ImageReader(mean=(0.5,), std=(0.25,))
    image = picture(9, 7, "L")
    found = reader.prepare(image.convert("RGB"))
    assert found.shape == (1, 7, 9)
    torch.testing.assert_close(found[0], (torch.from_numpy(np.array(image)) / 255 - 0.5) / 0.25)


def test_pictures_stand_upright(tmp_path: Path) -> None:
    """A camera held sideways says so in the file; the reference turns such pictures too when it reads them."""
    image = picture(40, 24)
    turned = pillow.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "a.png", exif=turned)
    found = open_image(tmp_path / "a.png")
    assert found.size == (24, 40)
    wanted = transformers.image_utils.load_image(str(tmp_path / "a.png"))
    assert np.array_equal(np.array(found), np.array(wanted))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 224, "resample": 2},
            ImageReader(resize=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 200, "image_mean": [0.4] * 3},
            ImageReader("DeiTImageProcessor", (256, 256), "bicubic", (200, 200), 1 / 255, (0.4,) * 3, (0.5,) * 3),
        ),
        (
            {"image_processor_type": "ViTImageProcessorFast", "do_normalize": False, "device": None, "do_pad": None},
            ImageReader(resize=(224, 224)),
        ),
    ],
)
def test_older_and_newer_files(told: dict[str, Any], expected: ImageReader) -> None:
    assert ImageReader.read_config(told, "a file") == expected


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "is of no named processor; supported are ViTImageProcessor"),
        ({"image_processor_type": "CLIPImageProcessor"}, "the image processor CLIPImageProcessor; supported"),
        ({"do_rezise": True}, r"a key 'do_rezise' that ViTImageProcessor does not know \(did you mean 'do_resize'"),
        ({"do_pad": True}, "do_pad = True; only False"),
        ({"data_format": "channels_last"}, "data_format = 'channels_last'; only 'channels_first'"),
        ({"size": {"longest_edge": 3}}, "the keys longest_edge; height and width are understood"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size has the keys shortest_edge"),
        ({"size": {"height": 10**9, "width": 1}}, "a side of 1000000000 pixels is not between"),
        ({"size": [1, 2, 3]}, "should have 2 entries"),
        ({"resample": 9}, "resample = 9, which is no number of a filter"),
        ({"image_std": [1, 0, 1]}, "std can't be 0"),
        ({"image_std": [1, 1]}, "one value for each channel"),
    ],
)
def test_what_is_not_understood(told: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ImageReader.read_config({"image_processor_type": "ViTImageProcessor"} | told if told else {}, "a file")


def test_only_what_is_about_images_is_read(tmp_path: Path) -> None:
    assert ImageReader.find(tmp_path) is None
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    assert ImageReader.find(tmp_path) is None


def bomb(side: int) -> bytes:
    """Return a PNG of a few hundred bytes that claims to be `side` pixels high and wide."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [int(PIXELS**0.5) + 1, 10_000, 50_000])
def test_decompression_bombs(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"bomb\.png has .* allowed"):
            open_image(tmp_path / "bomb.png")


def test_what_is_no_picture(tmp_path: Path) -> None:
    picture(300, 200).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    damaged = {"cut.png": whole[: len(whole) // 2], "text.png": b"no picture", "empty.png": b"", "bomb.png": bomb(500)}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is (damaged|no picture)"):
            open_image(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.png can't be read: No such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        open_image(tmp_path)
    frames = [picture(8, 8), picture(9, 8).resize((8, 8))]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="several pictures"):
        open_image(tmp_path / "two.gif")
    pillow.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        ImageReader().read(tmp_path / "deep.png")
    picture(8192, 1).save(tmp_path / "line.png")
    with pytest.raises(DataError, match="too narrow"):
        ImageReader(resize=8192).read(tmp_path / "line.png")


def test_damage_anywhere_is_told(tmp_path: Path) -> None:
    """Whatever bytes are wrong, there is either a picture or one kind of error."""
    chance = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        picture(20, 20).save(tmp_path / "a", format=kind)
        whole = np.frombuffer((tmp_path / "a").read_bytes(), np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[chance.integers(0, len(broken), 3)] = chance.integers(0, 256, 3)
            (tmp_path / "b").write_bytes(broken.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(DataError):
                    assert open_image(tmp_path / "b").width > 0


def test_one_batch_has_one_size(tmp_path: Path) -> None:
    for name, width in (("a.png", 10), ("b.png", 20)):
        picture(width, 10).save(tmp_path / name)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    assert ImageReader(resize=(8, 8)).batch(files).shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match=r"b\.png is prepared as \[3, 10, 20\], but .*a\.png \[3, 10, 10\]"):
        ImageReader().batch(files)


def test_a_reader_is_a_record() -> None:
    reader = ImageReader(resize=64, crop=(3, 4), mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert ImageReader.from_json(reader.to_json()) == reader
    assert json.loads(json.dumps(reader.write_config()))["size"] == {"shortest_edge": 64}
