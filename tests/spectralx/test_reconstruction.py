"""Stage 1; tests/golden holds both families against the published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx.adapt import METHODS, Method
from spectralx.adapters import IA3Conv2d, IA3Linear, LoRALinear, SLRLinear
from spectralx.reconstruction import FAMILIES, Family, MaskedReconstruction
from spectralx_kernels import AoMoALinear, HyperT, Linear, patchify

BANDS = [0.49, 0.56, 0.665, 0.842, 1.61]
WITH_AND_WITHOUT: list[Method | None] = [*METHODS, None]


def small(family: Family = "scalemae", **changes: Any) -> MaskedReconstruction:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": len(BANDS),
        "wavelengths": BANDS,
        "image_size": 64,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "decoder_embed_dim": 16,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
        "fcn_dim": 8,
    }
    tokenizer = "hypert" if changes.get("adapter", "aomoa") == "aomoa" else "conv"
    if changes.get("tokenizer", tokenizer) == "hypert":
        sizes["tokenizer_options"] = {"stem_dim": 16}
    return MaskedReconstruction(**{"family": family, **sizes, **changes})


def images_for(model: MaskedReconstruction, batch: int = 2) -> Tensor:
    return torch.rand(batch, model.in_channels, *model.image_size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", WITH_AND_WITHOUT)
def test_a_step_gives_gradients_to_what_trains_and_to_nothing_else(
    family: Family, adapter: Method | None
) -> None:
    model = small(family, adapter=adapter)
    result = model(images_for(model))
    assert result.loss.shape == ()
    assert result.prediction.shape == (2, 16, 16 * 16 * len(BANDS))
    assert result.mask.sum(1).tolist() == [12, 12]
    result.loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"cls_token", "mask_token"} <= touched
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # A new LoRA's `up` is zero and hides `down`; a new gate ties and its noise is weightless.
    silent = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert all(n.endswith(("down.weight", "down.bias")) for n in silent if adapter != "aomoa")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "grid"), [(32, (2, 2)), ((48, 32), (3, 2)), ([96, 64], (6, 4))])
@pytest.mark.parametrize("adapter", ["aomoa", "lora"])
def test_other_image_sizes(
    family: Family, size: int | tuple[int, int], grid: tuple[int, int], adapter: Method
) -> None:
    model = small(family, image_size=size, adapter=adapter).eval()
    assert model.grid == grid
    result = model(images_for(model, 3))
    assert result.prediction.shape[:2] == (3, grid[0] * grid[1])
    assert result.loss.isfinite()


@pytest.mark.parametrize(("patch", "adapter"), [(8, "slr"), (14, "slr"), (8, "aomoa")])
def test_other_patch_sizes(patch: int, adapter: Method) -> None:
    model = small("satmae++", adapter=adapter, patch_size=patch, image_size=3 * patch)
    result = model(images_for(model))
    assert result.prediction.shape == (2, 9, patch * patch * len(BANDS))
    result.loss.backward()


def test_the_convolutions_to_the_larger_image_may_be_narrow() -> None:
    model = small("satmae++", up_dim=3)
    assert model.proj_up_conv.weight.shape == (3, len(BANDS), 1, 1)
    result = model(images_for(model))
    result.loss.backward()
    gradient = model.proj_up_conv.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    again = MaskedReconstruction(**model.config)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_agree_with_their_images_alone(family: Family) -> None:
    model = small(family).eval()
    images = images_for(model, 3)
    noise = torch.rand(3, model.patches)
    together = model(images, noise)
    for index in range(3):
        alone = model(images[index : index + 1], noise[index : index + 1])
        torch.testing.assert_close(
            alone.prediction[0], together.prediction[index], rtol=1e-4, atol=1e-5
        )
        assert torch.equal(alone.mask[0], together.mask[index])


def test_mask_noise_decides_the_mask_and_is_drawn_when_absent() -> None:
    model = small("satmae++", adapter=None).eval()
    images = images_for(model, 1)
    noise = torch.arange(16.0).flip(0)[None] / 16
    result = model(images, noise)
    assert result.mask[0].tolist() == [1.0] * 12 + [0.0] * 4
    assert torch.equal(model(images, noise).loss, result.loss)
    torch.manual_seed(1)
    first = model(images).mask
    masks = [model(images).mask for _ in range(4)]
    assert any(not torch.equal(first, mask) for mask in masks)


def test_satmaepp_loss_is_of_masked_patches_and_of_an_enlarged_image() -> None:
    model = small("satmae++", adapter=None).eval()
    images = images_for(model)
    enlarged = []
    model.up_block.register_forward_hook(lambda *call: enlarged.append(call[-1]))
    loss, prediction, mask = model(images)
    errors = (prediction - patchify(images, 16)).square().mean(-1)
    squared = errors[mask.bool()].mean()
    target = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss, 0.6 * squared + 0.4 * (enlarged[0] - target).abs().mean())


def test_scalemae_predicts_the_image_and_what_a_patch_average_leaves_out() -> None:
    model = small("scalemae", adapter=None).eval()
    images = images_for(model)
    found: dict[str, Tensor] = {}
    for name in ("fcn_high", "fcn_low"):
        model.get_submodule(name).register_forward_hook(
            lambda *call, name=name: found.setdefault(name, call[-1])
        )
    loss, prediction, mask = model(images)
    assert torch.equal(prediction, patchify(found["fcn_low"], 16))
    base = F.interpolate(F.avg_pool2d(images, 16), size=(128, 128), mode="bilinear")
    high = F.interpolate(images, scale_factor=2) - base
    expected = torch.zeros(())
    for predicted, target in ((found["fcn_high"], high), (found["fcn_low"], images)):
        scale = predicted.shape[-1] // 4
        masked = mask.unflatten(1, (4, 4)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        errors = (predicted - target).square().sum(1)
        expected = expected + (errors * masked).sum() / masked.sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstructed_images(family: Family) -> None:
    model = small(family, image_size=(48, 32)).eval()
    images = images_for(model)
    noise = torch.rand(2, model.patches)
    pictures = model.reconstruct(images, noise)
    hidden = pictures.mask[:, None].expand_as(images)
    assert pictures.mask.shape == (2, 48, 32)
    assert pictures.mask.float().mean() == 5 / 6
    assert torch.equal(pictures.images, images)
    assert torch.equal(pictures.reconstructed[~hidden], images[~hidden])
    assert torch.equal(pictures.masked[~hidden], images[~hidden])
    assert not pictures.masked[hidden].any()
    assert torch.equal(pictures.reconstructed[hidden], pictures.predicted[hidden])
    result = model(images, noise)
    torch.testing.assert_close(patchify(pictures.predicted, 16), result.prediction)
    assert not pictures.predicted.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_where_the_paper_puts_them(family: Family) -> None:
    blocks = [5, 11]
    model = small(family, depth=12)
    kinds = {name: type(module) for name, module in model.named_modules()}
    adapted = {name for name, kind in kinds.items() if kind is AoMoALinear}
    ends = {"decoder_embed"} | ({"decoder_pred"} if family == "satmae++" else set())
    mlps = {f"blocks.{i}.mlp.{fc}" for i in blocks for fc in ("fc1", "fc2")}
    mlps |= {f"decoder_blocks.{i}.mlp.{fc}" for i in range(2) for fc in ("fc1", "fc2")}
    assert adapted == ends | mlps
    assert kinds["patch_embed.proj"] is HyperT
    other = small(family, depth=4, adapter="ia3", adapted_blocks=[0, 1])
    assert type(other.patch_embed.proj) is IA3Conv2d
    assert type(other.get_submodule("blocks.2.attn.qkv")) is Linear


def test_published_lora_leaves_the_last_layer_of_the_decoder() -> None:
    kinds = {
        adapter: type(small("satmae++", adapter=adapter).get_submodule("decoder_pred"))
        for adapter in METHODS
    }
    assert kinds == {
        "lora": Linear,
        "slr": SLRLinear,
        "ia3": IA3Linear,
        "aomoa": AoMoALinear,
    }


def test_options_reach_adapter_and_tokenizer() -> None:
    model = small(adapter="lora", adapter_options={"rank": 2}, tokenizer="hypert")
    layer = model.get_submodule("blocks.2.mlp.fc1")
    assert isinstance(layer, LoRALinear)
    assert layer.down.out_features == 2
    tokenizer = model.get_submodule("patch_embed.proj")
    assert isinstance(tokenizer, HyperT)
    assert tokenizer.proj.downsample_module.conv2.out_channels == 16
    assert not any(p.requires_grad for p in tokenizer.proj.parameters())
    assert tokenizer.down.weight.requires_grad


@pytest.mark.parametrize("adapter", WITH_AND_WITHOUT)
def test_all_trains_everything_but_what_adapters_froze(adapter: Method | None) -> None:
    model = small("satmae++", adapter=adapter, trainable="all")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(".linear." in name or ".proj.proj." in name for name in frozen) or not adapter
    assert bool(frozen) == (adapter is not None)
    assert all(p.requires_grad for p in model.get_submodule("blocks.0").parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_and_state_rebuild_the_model(family: Family) -> None:
    model = small(family, image_size=(32, 48)).eval()
    other = MaskedReconstruction(**model.config).eval()
    images, noise = images_for(model), torch.rand(2, model.patches)
    assert not torch.equal(model(images, noise).loss, other(images, noise).loss)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images, noise).loss, other(images, noise).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_tables_and_unused_tensors_are_accepted(family: Family) -> None:
    model = small(family, adapter=None)
    state = model.state_dict()
    state["pos_embed"] = torch.zeros(1, 17, 32)
    state["decoder_pos_embed"] = torch.zeros(1, 17, 16)
    if family == "scalemae":
        state["mask_token_decoder"] = torch.zeros(1, 1, 16)
    before = model.positions.clone()
    model.load_state_dict(state)
    assert torch.equal(model.positions, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: Family) -> None:
    model = small(family)
    images, noise = images_for(model), torch.rand(2, model.patches)
    model.eval()
    exact = model(images, noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images, noise)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, exact, rtol=3e-2, atol=0)
    result.loss.backward()
    assert model.cls_token.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls(family: Family) -> None:
    model = small(family, image_size=32).train()
    images = F.interpolate(torch.rand(4, len(BANDS), 3, 3), size=32, mode="bilinear")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"family": "mae"}, "family: got 'mae', expected one of satmae"),
        ({"adapter": "dora"}, "method: got 'dora'"),
        ({"tokenizer": "patch"}, "tokenizer: got 'patch'"),
        ({"trainable": "none"}, "trainable: got 'none'"),
        ({"image_size": 40}, "image_size: got 40x40, expected multiples of patch_size 16"),
        ({"image_size": (32, 0)}, "image_size: got 32x0"),
        ({"patch_size": 0}, "patch_size: got 0"),
        ({"patch_size": 8}, "patch_size: got 8, expected 16 with scalemae"),
        ({"wavelengths": None}, "wavelengths: got None"),
        ({"mask_ratio": 1.0}, r"mask_ratio: got 1\.0"),
        ({"embed_dim": 30}, "expected a divisor of dim=30"),
        ({"adapter": None, "tokenizer_options": {"stem_dim": 16}}, "tokenizer_options: got"),
        ({"adapted_blocks": [7]}, r"\[7\]"),
        ({"fcn_dim": 6}, "dim: got 6"),
        ({"up_dim": 0}, "up_dim: got 0, expected at least 1"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        small(**changes)


@pytest.mark.parametrize("shape", [(5, 64, 64), (2, 4, 64, 64), (2, 5, 64, 32)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: got shape .* expected \[B, 5, 64, 64\]"):
        small(adapter=None)(torch.zeros(shape))
