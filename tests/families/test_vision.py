"""Images of other sizes than a model was made for, older folders, and what an image model can't be given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families import read_family
from polyformer.parts.flow import Trace
from polyformer.spec import walk
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES, Case
from tests.families.parity import load, reference, theirs, transformers

BY_NAME = {case.name: case for case in CASES}


def pixels(case: Case, height: int, width: int) -> torch.Tensor:
    """Return two random images."""
    return torch.randn(2, case.sizes[0], height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["vit", "vit-classifier", "deit", "deit-teacher"])
@pytest.mark.parametrize("size", [(24, 24), (40, 40), (16, 64), (8, 8)], ids=str)
def test_positions_of_other_image_sizes(name: str, size: tuple[int, int]) -> None:
    """The grid follows the image, and its positions are interpolated as the reference does when it is asked to."""
    case = BY_NAME[name]
    images = pixels(case, *size)
    model: Any = load(case).model
    with torch.no_grad():
        found = model(pixel_values=images)
        wanted = theirs(reference(case)[0], {"pixel_values": images, "interpolate_pos_encoding": torch.tensor(True)})
    for key, tensor in wanted.items():
        torch.testing.assert_close(getattr(found, key), tensor, atol=1e-5, rtol=1e-5)


def test_positions_of_other_sizes_learn() -> None:
    case = BY_NAME["deit"]
    images = pixels(case, 16, 40)
    model, own = reference(case)[0], load(case).model
    try:
        for hidden in (own(pixel_values=images).hidden, model(images, interpolate_pos_encoding=True).last_hidden_state):
            torch.autograd.backward((hidden * torch.linspace(-1, 1, 16)).square().mean())
        wanted = model.embeddings.position_embeddings.grad[0].clone()
    finally:
        model.zero_grad(set_to_none=True)
    found = own.get_parameter("source.positions.weight").grad
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_an_oblong_grid_is_interpolated_along_its_own_sides() -> None:
    """Twice as high an image of the same width: a column of positions that rises linearly still does."""
    model = load(BY_NAME["vit-oblong"]).model
    table = model.get_parameter("source.positions.weight")  # 1 + 3 x 4
    with torch.no_grad():
        table[1:] = torch.arange(3.0).repeat_interleave(4)[:, None]
        rows = [model.source(torch.zeros(1, 1, 48, 16), model.source.begin(_given(48, 16)))[0, 1:, 0]]  # type: ignore[misc]
    down = rows[0].view(6, 4) - rows[0][0]
    assert (down.diff(dim=0) > 0).all()
    assert (down.diff(dim=1).abs() < 1e-6).all()


def _given(height: int, width: int) -> Any:
    return pf.parts.inputs.Given(torch.zeros(1, 1, height, width))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["swin", "swin-classifier"])
def test_swin_reads_images_of_any_size(name: str) -> None:
    """Windows are padded, odd grids merged, small grids have small windows; and each image is read by itself."""
    case = BY_NAME[name]
    model: Any = load(case).model
    for height, width in [(32, 32), (29, 41), (24, 20), (64, 21)]:
        fresh = reference.__wrapped__(case)[0]  # the reference keeps the windows of the smallest image it has seen
        images = pixels(case, height, width)
        with torch.no_grad():
            found, wanted = model(pixel_values=images), theirs(fresh, {"pixel_values": images})
        for key, tensor in wanted.items():
            torch.testing.assert_close(getattr(found, key), tensor, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        small = model(pixel_values=pixels(case, 8, 9)).hidden  # 2 x 3 patches, less than a window of 3 x 3
    assert small.shape == (2, 2, 16)
    assert small.isfinite().all()


@pytest.mark.parametrize("name", ["vit-classifier", "deit-teacher", "swin-classifier"])
def test_from_a_file_to_scores(name: str, tmp_path: Path) -> None:
    """A folder that says how images are prepared reads one as the reference does, and says so again when saved."""
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed (the extra 'images')")
    model, folder = reference(BY_NAME[name])
    shutil.copytree(folder, tmp_path / "model")
    kind = transformers.DeiTImageProcessorPil if name.startswith("deit") else transformers.ViTImageProcessorPil
    size = {"height": 24, "width": 24}
    processor = kind(size={"height": 30, "width": 27}, crop_size=size) if name.startswith("deit") else kind(size=size)
    processor.save_pretrained(tmp_path / "model")
    values = torch.randint(0, 256, (50, 40, 3), dtype=torch.uint8)
    image = pillow.fromarray(values.numpy())
    image.save(tmp_path / "image.png")
    pf.save(pf.load(tmp_path / "model"), tmp_path / "again")
    for place in ("model", "again"):
        loaded: Any = pf.load(tmp_path / place)
        with torch.no_grad():
            found = loaded.model(pixel_values=loaded.images.read(tmp_path / "image.png")[None]).logits
            wanted = model(**processor(image, return_tensors="pt")).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_attention_maps_of_windows_are_traced() -> None:
    case = BY_NAME["swin"]
    model: Any = load(case).model
    trace = Trace()
    with torch.no_grad():
        model(pixel_values=pixels(case, 32, 32), trace=trace)
    shapes = {name: list(weights.shape) for name, weights in trace.attention.items()}
    assert list(shapes) == [f"encoder.{i}.{j}.steps.0.op.op" for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))]
    assert shapes["encoder.0.0.steps.0.op.op"] == [2 * 9, 2, 9, 9]  # 8 x 8 rows in windows of 3, two heads
    assert shapes["encoder.1.2.steps.0.op.op"] == [2 * 4, 4, 9, 9]
    shifted = trace.attention["encoder.0.1.steps.0.op.op"]
    assert (shifted[8] == 0).any()  # the last window holds rows from opposite edges, which don't meet
    assert not (shifted[0] == 0).any()


def test_stochastic_depth_grows_with_depth() -> None:
    spec = read_family(dict(BY_NAME["swin"].keys) | {"model_type": "swin", "drop_path_rate": 0.4}, "a file").spec()
    rates = [record.rate for _, record in walk(spec) if isinstance(record, pf.parts.DropPath)]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_an_older_swin(tmp_path: Path) -> None:
    """Older folders hold the offsets of rows, which follow from the window, and keys that say nothing new."""
    case = BY_NAME["swin"]
    model, folder = reference(case)
    tensors = load_file(folder / SINGLE)
    index = model.encoder.layers[0].blocks[0].attention.relative_position_bias.relative_position_index.view(9, 9)
    name = "encoder.layers.{}.blocks.{}.attention.self.relative_position_index"
    tensors |= {name.format(i, j): index.clone() for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))}
    save_file(tensors, tmp_path / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"path_norm": True, "num_hidden_layers": 2}))
    assert pf.load(tmp_path).family == load(case).family
    tensors[name.format(1, 1)] = index + 1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(WeightsError, match=r"1\.blocks\.1\.attention\.self\.relative_position_index.* is not what"):
        pf.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("vit", torch.zeros(1, 3, 25, 24), "an image of 25 x 24 pixels is not made of patches of 8 x 8; resize"),
        ("vit", torch.zeros(1, 1, 24, 24), r"shape \[1, 1, 24, 24\]; this model needs floats \[batch, 3, height"),
        ("vit", torch.zeros(3, 24, 24), r"shape \[3, 24, 24\]; this model needs"),
        ("vit", torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "torch.uint8 and shape .* needs floats"),
        ("vit-left-over", torch.zeros(1, 3, 7, 24), "7 x 24 pixels is smaller than a patch of 8 x 8"),
    ],
)
def test_what_is_no_image(name: str, images: torch.Tensor, message: str) -> None:
    model: Any = load(BY_NAME[name]).model
    with pytest.raises(SpecError, match=message):
        model(pixel_values=images)


def test_an_image_model_reads_only_images() -> None:
    model: Any = load(BY_NAME["vit"]).model
    images = torch.zeros(2, 3, 24, 24)
    with pytest.raises(SpecError, match="nothing in this model can take input_ids"):
        model(torch.zeros(2, 3, dtype=torch.long), pixel_values=images)
    with pytest.raises(SpecError, match="nothing in this model can take bool_masked_pos"):
        model(pixel_values=images, bool_masked_pos=images)
    with pytest.raises(SpecError, match="this model needs pixel_values"):
        model()
    with pytest.raises(SpecError, match=r"the attention mask has shape \[2, 9\]; 2 rows of 10 tokens"):
        model(pixel_values=images, attention_mask=torch.ones(2, 9))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("vit", {"patch_size": 32}, "an image must have room for a patch"),
        ("vit", {"num_attention_heads": 3}, "16 can't be cut into 3 heads"),
        ("vit", {"image_size": [24, 24, 24]}, "should have 2 entries"),
        ("vit", {"use_mask_token": True}, "a key 'use_mask_token' that the family vit does not know"),
        ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "of a ViTForMaskedImageModeling; supported"),
        ("swin", {"num_heads": [2]}, "num_heads and depths differ"),
        ("swin", {"hidden_size": 99}, "hidden_size = 99, but depths and embed_dim make it 16"),
        ("swin", {"depths": [2, 9**9]}, "1 to 1024 blocks"),
        ("swin", {"window_size": 0}, "window_size = 0"),
        ("swin", {"path_norm": False}, "path_norm = False; only True"),
    ],
)
def test_what_an_image_model_can_not_be(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_family(BY_NAME[model_type].keys | {"model_type": model_type} | changes, "a file").spec()


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Swin"])
def test_the_defaults_are_the_reference_s(name: str) -> None:
    theirs = getattr(transformers, f"{name}Config")().to_dict()
    family = read_family({"model_type": theirs["model_type"]}, "a file")
    own = json.loads(json.dumps(family.to_data()))
    assert {key: value for key, value in own.items() if key not in ("architecture", "labels")} == {}
    told = {key: value for key, value in theirs.items() if not isinstance(value, dict)}
    read = read_family(told | {"architectures": None}, "a file").to_data()
    read.pop("pooler_output_size", None)  # its default is the width
    assert read == family.to_data()
