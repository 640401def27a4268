"""Images are classified as the reference does, from files, by what the folder says of their preparation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import polyformer as pf
from polyformer.errors import SpecError
from polyformer.swap import Conversion

transformers = pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

SAID = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def checkpoint(folder: Path) -> Any:
    """Save a small random ViT with three labels, and how its images are prepared."""
    torch.manual_seed(2)
    keys: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    names = {0: "cat", 1: "dog", 2: "bird"}
    config = transformers.ViTConfig(**keys, intermediate_size=24, patch_size=4, id2label=names, label2id={})
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SAID))
    return model


def pictures(folder: Path) -> list[Path]:
    """Write three random pictures of other sizes."""
    chance = torch.Generator().manual_seed(1)
    files = []
    for i, size in enumerate([(16, 16), (40, 23), (9, 31)]):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=chance, dtype=torch.uint8)
        files.append(folder / f"{i}.png")
        image.fromarray(pixels.numpy()).save(files[-1])
    return files


def test_labels_are_the_reference_s(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "vit")
    files = pictures(tmp_path)
    reader = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit", backend="pil")
    loaded = pf.load(tmp_path / "vit")
    for file, labels in zip(files, loaded.classify(files), strict=True):
        pixels = reader(image.open(file), return_tensors="pt").pixel_values
        with torch.no_grad():
            chances = torch.softmax(model(pixels).logits[0], -1)
        found = {one.label: one.probability for one in labels}
        assert found == pytest.approx({model.config.id2label[i]: float(p) for i, p in enumerate(chances)}, abs=1e-4)
        assert [one.probability for one in labels] == sorted(found.values(), reverse=True)
    pf.save(loaded, tmp_path / "again")
    again = pf.load(tmp_path / "again")
    assert again.classify(files) == loaded.classify(files)
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == SAID


def test_a_folder_that_does_not_say_how(tmp_path: Path) -> None:
    checkpoint(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(SpecError, match="doesn't say how images are prepared"):
        pf.load(tmp_path / "vit").classify(pictures(tmp_path))


def test_other_parts_keep_how_images_are_prepared(tmp_path: Path) -> None:
    checkpoint(tmp_path / "vit")
    files = pictures(tmp_path)
    loaded = pf.load(tmp_path / "vit")
    made, _ = pf.transplant(loaded.model, Conversion(norm="rms"))
    changed = dataclasses.replace(loaded, model=made)
    pf.save(changed, tmp_path / "ours")
    assert pf.load(tmp_path / "ours").classify(files) == changed.classify(files)
