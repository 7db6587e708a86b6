from __future__ import annotations

import pytest
import torch

from spectralx.lightning_modules import SegmentationStage
from spectralx.mixing import cutmix
from spectralx.segmentation import Segmentation
from spectralx.settings import OptimizerSettings


def test_a_rectangle_of_image_and_mask_comes_from_the_next_image() -> None:
    torch.manual_seed(0)
    count, height, width = 40, 8, 12
    number = torch.arange(count)[:, None, None]
    place = torch.arange(height * width).reshape(height, width)
    masks = 1000 * number + place  # which image, and where in it
    images = torch.stack([masks, 2 * masks], dim=1).float()
    before = images.clone(), masks.clone()
    mixed, labels = cutmix(images, masks, 0.5)
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])
    assert torch.equal(mixed, torch.stack([labels, 2 * labels], dim=1).float())
    assert torch.equal(labels % 1000, place.expand_as(labels))  # nothing moved
    origin = (labels // 1000 - number) % count
    assert set(origin.unique().tolist()) == {0, 1}
    taken = origin == 1
    changed = taken.flatten(1).any(1)
    assert 0.25 * count < changed.sum() < 0.75 * count
    for part in taken[changed]:
        rows, columns = part.any(1), part.any(0)
        assert torch.equal(part, rows[:, None] & columns)  # a rectangle ...
        for line in (rows, columns):  # ... without gaps
            found = line.nonzero()
            assert len(found) == found.max() - found.min() + 1
    shares = taken[changed].float().mean((1, 2))
    assert shares.min() < 0.2
    assert shares.max() > 0.8


def test_none_or_all_are_mixed() -> None:
    torch.manual_seed(1)
    images, masks = torch.rand(6, 3, 4, 4), torch.arange(6)[:, None, None].expand(6, 4, 4)
    assert torch.equal(cutmix(images, masks, 0.0)[0], images)
    assert all((a != b).any() for a, b in zip(cutmix(images, masks, 1.0)[1], masks, strict=True))


def test_stage_2_trains_on_what_is_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Segmentation(
        "satmae++", 3, 3, adapter=None, image_size=8, patch_size=2, embed_dim=8, depth=1,
        num_heads=1, trainable="all", decoder="linear", dropout=0.0,
    )  # fmt: skip
    names = ["unlabelled", "a", "b"]
    stage = SegmentationStage(model, OptimizerSettings(), 1, class_names=names, cutmix=1.0)
    monkeypatch.setattr(stage, "log_training_loss", lambda loss, batch: loss)
    images, masks = torch.rand(4, 3, 8, 8), torch.randint(3, (4, 8, 8))
    torch.manual_seed(1)
    loss = stage.training_step({"image": images, "mask": masks, "path": [""] * 4}, 0)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, model.loss(*cutmix(images, masks, 1.0)))
    assert not torch.isclose(loss, model.loss(images, masks))
