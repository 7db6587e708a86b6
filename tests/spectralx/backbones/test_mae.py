"""The masked autoencoder's encoder and decoder, and the heads of both families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spectralx.backbones.channel_norm import ChannelNorm
from spectralx.backbones.encoder import PatchEmbed
from spectralx.backbones.mae import MaskedAutoencoder
from spectralx.backbones.satmaepp import UpsamplingBlock
from spectralx.backbones.scalemae import ConvHead, FeaturePyramid

PATCH, GRID = 4, (3, 4)


def autoencoder(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 8,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "mlp_ratio": 2.0,
        "resolution": 1.0,
        "decoder_class_token": True,
        "mask_ratio": 0.5,
    }
    return MaskedAutoencoder(
        PatchEmbed(nn.Conv2d(3, 16, PATCH, PATCH)), GRID, **{**sizes, **changes}
    ).eval()


def test_hidden_patches_do_not_reach_the_encoder() -> None:
    model = autoencoder()
    images = torch.randn(2, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    latent, mask, ids_restore = model.encode(images, torch.rand(2, model.patches))
    assert latent.shape == (2, 1 + 6, 16)
    assert mask.sum(1).tolist() == [6, 6]
    hidden = mask.unflatten(1, GRID).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    noise = ids_restore.float()
    changed, _, _ = model.encode(torch.where(hidden[:, None] > 0, 9.0, images), noise)
    torch.testing.assert_close(changed, latent)
    seen, _, _ = model.encode(torch.where(hidden[:, None] > 0, images, 9.0), noise)
    assert not torch.allclose(seen, latent, atol=1e-2)


def test_decoder_puts_tokens_back_in_their_places() -> None:
    """The order in which the encoder met the patches does not matter to the decoder."""
    model = autoencoder(mask_ratio=0.0)
    images = torch.randn(1, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    in_order = torch.arange(model.patches, dtype=torch.float32)[None]
    latent, _, ids = model.encode(images, in_order)
    other_latent, mask, other_ids = model.encode(images, in_order.flip(1))
    assert not mask.any()
    torch.testing.assert_close(other_latent[:, 1:].flip(1), latent[:, 1:])
    torch.testing.assert_close(model.decode(other_latent, other_ids), model.decode(latent, ids))


@pytest.mark.parametrize("class_token", [False, True])
def test_decoder_keeps_or_drops_the_class_token(class_token: bool) -> None:
    model = autoencoder(decoder_class_token=class_token)
    images = torch.randn(2, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    latent, _, ids_restore = model.encode(images, torch.rand(2, model.patches))
    assert model.decode(latent, ids_restore).shape == (2, model.patches + class_token, 8)
    moved = latent.clone()
    moved[:, 0] += 1.0
    differs = not torch.equal(model.decode(moved, ids_restore), model.decode(latent, ids_restore))
    assert differs == class_token


@pytest.mark.parametrize(
    ("ratio", "visible"), [(0.0, 12), (0.5, 6), (0.75, 3), (0.9, 1), (0.99, 1), (2 / 3, 4)]
)
def test_visible_patches(ratio: float, visible: int) -> None:
    assert autoencoder(mask_ratio=ratio).visible == visible


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_mask_ratio_is_checked(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio: got {ratio}"):
        autoencoder(mask_ratio=ratio)


def test_channel_norm_is_over_channels() -> None:
    x = torch.randn(2, 6, 3, 4) * 5 + 2
    y = ChannelNorm(6)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 3, 4), rtol=0, atol=1e-4)


def test_upsampling_block_doubles_the_side() -> None:
    assert UpsamplingBlock(8, 2)(torch.randn(2, 8, 5, 7), ChannelNorm(8)).shape == (2, 2, 10, 14)


def test_scalemae_heads_reach_sixteen_and_thirty_two_times_the_side() -> None:
    high, low = FeaturePyramid(8)(torch.randn(2, 8, 2, 3))
    head = ConvHead(8, 12, 1, 5)
    assert head(high).shape == (2, 5, 64, 96)
    assert head(low).shape == (2, 5, 32, 48)


@pytest.mark.parametrize("dim", [0, 6])
def test_conv_head_width_is_checked(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim: got {dim}"):
        ConvHead(8, dim, 1, 5)
