from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spectralx.backbones.dinov3 import AxialRope, DINOv3, KeyMaskedLinear, rotate


def encoder(**options) -> DINOv3:
    torch.manual_seed(0)
    return DINOv3(nn.Identity(), embed_dim=32, depth=3, num_heads=4, **options)


def test_rope_follows_the_formula():
    rope = AxialRope(8, dtype=torch.float64)
    sin, cos = rope(3, 5)
    row, column = 2, 1
    angles = [
        2 * math.pi * coordinate / 100 ** (2 * j / 4)
        for coordinate in (2 * (row + 0.5) / 3 - 1, 2 * (column + 0.5) / 5 - 1)
        for j in range(2)
    ] * 2
    expected = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(sin[row * 5 + column], expected.sin())
    torch.testing.assert_close(cos[row * 5 + column], expected.cos())


def test_rotation_keeps_lengths_and_leaves_the_first_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5 + 12, 8, generator=generator, dtype=torch.float64)
    turned = rotate(x, AxialRope(8, dtype=torch.float64)(3, 4))
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    assert not torch.allclose(turned[:, :, 5:], x[:, :, 5:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotation_turns_by_the_positions_angle():
    """Of a pair (first half, second half): the complex number times e^(i angle)."""
    x = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sin, cos = rotation = AxialRope(8, dtype=torch.float64)(3, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, :4]
    found = rotate(x, rotation)
    torch.testing.assert_close(torch.complex(found[..., :4], found[..., 4:]), turned)


def test_rope_runs_in_bfloat16():
    x = torch.full((1, 1, 6, 8), 1.001)
    turned = rotate(x, AxialRope(8)(2, 2))
    assert turned.dtype == torch.float32
    assert torch.equal(turned, turned.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rope_runs_in_its_own_dtype_under_autocast(dtype: torch.dtype) -> None:
    model, image = encoder(), torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        (tokens,) = model.features(image, (2, 3), (2,))
    (exact,) = model.features(image, (2, 3), (2,))
    torch.testing.assert_close(tokens.float(), exact, atol=0.05, rtol=0.05)
    x = torch.full((1, 1, 6, 8), 1.001)
    plain = rotate(x, AxialRope(8)(2, 2))
    with torch.autocast("cpu", dtype):
        assert torch.equal(rotate(x, AxialRope(8)(2, 2)), plain)


def test_scores_depend_on_relative_position_only():
    """Shifting both positions along a row leaves the product of query and key."""
    sin, cos = AxialRope(8, dtype=torch.float64)(4, 4)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return (
            rotate(query, (sin[i : i + 1], cos[i : i + 1]))
            * rotate(key, (sin[j : j + 1], cos[j : j + 1]))
        ).sum()

    torch.testing.assert_close(score(0, 1), score(2, 3))
    assert not torch.allclose(score(0, 1), score(0, 2))


def test_key_bias_does_not_act():
    layer = KeyMaskedLinear(4, 12)
    nn.init.ones_(layer.bias)
    out = layer(torch.zeros(4))
    assert torch.equal(out, torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 4))
    out.sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, out.detach())


def test_features_are_normed_patch_tokens_of_the_named_blocks():
    model = encoder(layer_scale=0.5)
    patches = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    found = model.features(patches, (2, 3), (0, 2))
    assert [tuple(feature.shape) for feature in found] == [(2, 6, 32)] * 2
    last = found[-1]
    torch.testing.assert_close(last.mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    assert torch.equal(found[0], model.features(patches, (2, 3), (0,))[0])
    assert not torch.allclose(last, model.features(patches, (3, 2), (0, 2))[-1])


def test_refinement_goes_on_to_the_next_block():
    model = encoder(layer_scale=0.5)
    patches = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    seen = []

    def refine(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return tokens + torch.arange(32.0)

    plain = model.features(patches, (2, 2), (0, 1))
    refined = model.features(patches, (2, 2), (0, 1), refine)
    assert seen == [(1, 4, 32)] * 2
    assert not torch.allclose(plain[0], refined[0])
    # Block 1 sees the refined tokens: refining only its output gives something else.
    last_only = model.features(patches, (2, 2), (1,), refine)[0]
    assert not torch.allclose(last_only, refined[1])


def test_published_names_load():
    model = encoder()
    state = model.state_dict()
    assert {"rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "blocks.2.ls2.gamma"} <= set(state)
    state["mask_token"] = torch.zeros(1, 32)
    state["local_cls_norm.weight"] = torch.zeros(32)
    state["local_cls_norm.bias"] = torch.zeros(32)
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="surplus"):
        model.load_state_dict({**state, "surplus": torch.zeros(1)})


def test_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="head_dim: got 6, expected a multiple of 4"):
        AxialRope(6)
