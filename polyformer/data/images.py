"""Images for models: read safely, and prepared exactly as a checkpoint's `preprocessor_config.json` says.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyformer.data.preprocessor import find_preprocessor, save_preprocessor
from polyformer.errors import DataError, SpecError, suggest
from polyformer.spec import Record

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = 2**26
"""How many pixels a picture may have, before and after resizing: 67 million, 200 MB unpacked."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

_GREY: tuple[float, ...] = (0.5, 0.5, 0.5)
_VIT: dict[str, Any] = {
    "crop_size": None,
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": _GREY,
    "image_std": _GREY,
    "resample": FILTERS.index("bilinear"),
    "rescale_factor": 1 / 255,
    "size": 224,
}
KINDS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _VIT,
    "DeiTImageProcessor": _VIT
    | {"crop_size": 224, "do_center_crop": True, "resample": FILTERS.index("bicubic"), "size": 256},
}
"""The reference's image processors that are read, with their defaults; Swin's models use ViT's."""

PLAIN: dict[str, tuple[Any, ...]] = {
    "data_format": (None, "channels_first"),
    "default_to_square": (None, True),
    "do_pad": (None, False),
    "image_seq_length": (None,),
    "input_data_format": (None, "channels_first"),
    "pad_size": (None,),
}
"""Further keys, with the values that ask for nothing."""

REMARKS = frozenset(
    (
        "_valid_processor_keys",
        "device",
        "disable_grouping",
        "do_convert_rgb",  # an image is converted to the model's channels in any case
        "feature_extractor_type",
        "image_processor_type",
        "processor_class",
        "return_tensors",
    )
)


class ImageReader(Record):
    """How images are prepared for a model: resized, cropped around the centre, rescaled, normalised, in this order.

    Attributes:
        kind: the reference's class of it.
        resize: the new height and width, or the new length of the shorter side; None to keep an image's size.
        filter: how it is resized.
        crop: height and width of what is kept; a smaller image gets a black border. None to keep all.
        rescale: what values from 0 to 255 are multiplied with.
        mean, std: of each channel after rescaling, for (x - mean) / std; empty if nothing is normalised.
    """

    kind: str = "ViTImageProcessor"
    resize: tuple[int, int] | int | None = None
    filter: Filter = "bilinear"
    crop: tuple[int, int] | None = None
    rescale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def check(self) -> None:
        self.require(self.kind in KINDS, f"there is no image processor '{self.kind}'{suggest(self.kind, KINDS)}")
        self.require(len(self.mean) == len(self.std), "mean and std should have one value for each channel")
        self.require(len(self.mean) in (0, *MODES), f"{len(self.mean)} channels are neither grey nor coloured")
        self.require(0 not in self.std, "std can't be 0")
        for size in (self.resize, self.crop):
            for side in (size,) if isinstance(size, int) else size or ():
                self.require(1 <= side <= 8192, f"a side of {side} pixels is not between 1 and 8192")

    @classmethod
    def find(cls, folder: Path) -> ImageReader | None:
        """Return what lies in a checkpoint's folder; None where there is nothing or it is about something else.

        Raises:
            SpecError: preparation that is not understood in full.
            WeightsError: a damaged file, or a link out of the folder.
        """
        found = find_preprocessor(folder)
        return None if found is None or "sampling_rate" in found[0] else cls.read_config(*found)

    @classmethod
    def read_config(cls, data: Mapping[str, Any], where: str) -> ImageReader:
        """Read the content of a `preprocessor_config.json`; raises `SpecError` for what is not understood in full."""
        said = str(data.get("image_processor_type") or data.get("feature_extractor_type") or "")
        kind = said.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
        if kind not in KINDS:
            known = f"supported are {', '.join(KINDS)}"
            raise SpecError(f"{where} is of {f'the image processor {said}' if said else 'no named processor'}; {known}")
        for key, value in data.items():
            if key not in KINDS[kind] and key not in REMARKS and key not in PLAIN:
                raise SpecError(f"{where} has a key '{key}' that {kind} does not know{suggest(key, KINDS[kind])}")
            if key in PLAIN and value not in PLAIN[key]:
                raise SpecError(f"{where} has {key} = {value!r}; only {PLAIN[key][-1]!r} is supported")
        own = {key: value if data.get(key) is None else data[key] for key, value in KINDS[kind].items()}
        fields = {
            "kind": kind,
            "resize": _size(own["size"], f"{where}: size", shorter=True) if own["do_resize"] else None,
            "filter": _filter(own["resample"], where),
            "crop": _size(own["crop_size"], f"{where}: crop_size") if own["do_center_crop"] else None,
            "rescale": own["rescale_factor"] if own["do_rescale"] else 1.0,
            "mean": _channels(own["image_mean"]) if own["do_normalize"] else (),
            "std": _channels(own["image_std"]) if own["do_normalize"] else (),
        }
        return cls.from_data(fields, where)

    def write_config(self) -> dict[str, Any]:
        """Return the content of a `preprocessor_config.json`."""
        told: dict[str, Any] = {
            "do_center_crop": self.crop is not None,
            "do_normalize": bool(self.mean),
            "do_rescale": True,
            "do_resize": self.resize is not None,
            "image_processor_type": self.kind,
            "resample": FILTERS.index(self.filter),
            "rescale_factor": self.rescale,
        }
        if isinstance(self.resize, int):
            told["size"] = {"shortest_edge": self.resize}
        elif self.resize is not None:
            told["size"] = dict(zip(("height", "width"), self.resize, strict=True))
        if self.crop is not None:
            told["crop_size"] = dict(zip(("height", "width"), self.crop, strict=True))
        if self.mean:
            told |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        return told

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json` into a folder."""
        save_preprocessor(folder, self.write_config())

    def read(self, file: str | Path) -> Tensor:
        """Read a file -> [C, H, W]; raises `DataError` as `open_image` does."""
        return self.prepare(open_image(file), str(file))

    def batch(self, files: Sequence[str | Path]) -> Tensor:
        """Read several files -> [B, C, H, W]; raises `DataError`, also where they come out at different sizes."""
        prepared = [self.read(file) for file in files]
        for file, one in zip(files, prepared, strict=True):
            if one.shape != prepared[0].shape:
                told = f"{list(one.shape)}, but {files[0]} {list(prepared[0].shape)}"
                raise DataError(f"{file} is prepared as {told}: they can't go into one batch")
        return torch.stack(prepared)

    def prepare(self, image: Image, where: str = "the image") -> Tensor:
        """Prepare one picture -> [C, H, W] in float32; raises `DataError` for one that can't be."""
        from PIL.Image import Resampling

        image = _converted(image, MODES[len(self.mean) or 3], where)
        if self.resize is not None:
            image = image.resize(self._resized(image.size, where), Resampling(FILTERS.index(self.filter)))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        scaled = (np.asarray(image).astype(np.float64) * self.rescale).astype(np.float32)
        pixels = torch.from_numpy(scaled.reshape(image.height, image.width, -1))
        if self.mean:
            pixels = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        return pixels.permute(2, 0, 1).contiguous()

    def _resized(self, size: tuple[int, int], where: str) -> tuple[int, int]:
        """Return the new width and height."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        shorter = min(size)
        width, height = (self.resize if side == shorter else int(self.resize * side / shorter) for side in size)
        if width * height > PIXELS:
            raise DataError(f"{where} is too narrow: it would be resized to {width:,} x {height:,} pixels")
        return width, height


def open_image(file: str | Path) -> Image:
    """Read a picture, turned as its camera says it should be.

    Only the formats of `FORMATS` are tried, and pictures are measured before they are unpacked.

    Raises:
        DataError: no such file; no picture, or a damaged one; more than `PIXELS` pixels; more than one picture.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise DataError("reading images needs Pillow: pip install 'polyformer[images]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # the limit here is a lower one
            opened = PIL.Image.open(file, formats=FORMATS)
        with opened as image:
            width, height = image.size
            if width * height > PIXELS:
                raise DataError(f"{file} has {width:,} x {height:,} pixels, more than the {PIXELS:,} allowed")
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{file} holds several pictures; save the one that is meant by itself")
            return PIL.ImageOps.exif_transpose(image)
    except DataError:
        raise
    except PIL.Image.DecompressionBombError:
        raise DataError(f"{file} has more than the {PIXELS:,} pixels allowed") from None
    except PIL.UnidentifiedImageError:
        raise DataError(f"{file} is no picture in one of the formats {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, struct.error, zlib.error) as error:
        told = f"can't be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else "is damaged"
        raise DataError(f"{file} {told}") from None


def _converted(image: Image, mode: str, where: str) -> Image:
    """Return an image in a model's colours; what is transparent becomes white."""
    import PIL.Image

    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where} has {image.mode} pixels of more than 8 bits; convert it to 8 bits a channel first")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _size(said: Any, where: str, shorter: bool = False) -> Any:
    """Read one of the spellings of a size: (height, width), or the shorter side where that is allowed."""
    if isinstance(said, Mapping):
        keys = set(said)
        if keys == {"height", "width"}:
            return [said["height"], said["width"]]
        if keys == {"shortest_edge"} and shorter:
            return said["shortest_edge"]
        raise SpecError(f"{where} has the keys {', '.join(map(str, keys))}; height and width are understood")
    return [said, said] if isinstance(said, int) else said


def _filter(said: Any, where: str) -> str:
    if not isinstance(said, int) or not 0 <= said < len(FILTERS):
        raise SpecError(f"{where} has resample = {said!r}, which is no number of a filter from 0 to {len(FILTERS) - 1}")
    return FILTERS[said]


def _channels(said: Any) -> Any:
    """One number stands for that of all three channels."""
    return [said] * 3 if isinstance(said, (int, float)) else said
