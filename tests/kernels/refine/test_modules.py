"""`AreAdapter` as a module: sizes, names, what gradients reach, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels import official_inert, official_parameters
from spectralx_kernels.refine import AreAdapter

Inputs = tuple[Tensor, Tensor, Tensor]


def small(**options: Any) -> AreAdapter:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 8, "tokens": (2, 3), "spatial_dim": 6}
    adapter = AreAdapter(**(sizes | options))
    with torch.no_grad():
        adapter.scale.fill_(0.5)
    return adapter


def inputs(batch: int, tokens: int = 6, positions: int = 24, dtype: Any = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=dtype)

    return draw(tokens, 8), draw(positions, 6), draw(6, positions)


def by_definition(adapter: AreAdapter, tokens: Tensor, spatial: Tensor, spectral: Tensor) -> Tensor:
    """One image at a time, with the whole attention matrix. Evaluation mode."""
    height, width = adapter.feature_map
    refined = []
    for x, features in zip(tokens, zip(spatial, spectral, strict=True), strict=True):
        weighted = []
        for half, feature, match, convolve in zip(
            x.chunk(2, dim=-1),
            features,
            (adapter.spa_match_attn, adapter.spe_match_attn),
            (adapter.refine_spa, adapter.refine_spe),
            strict=True,
        ):
            q, k = match.to_q(match.norm_latents(half)), match.to_k(match.norm_media(feature))
            best = torch.softmax(q @ k.T / k.shape[1] ** 0.5, dim=1).argmax(dim=0)
            matched = adapter.norm(half[best])
            if convolve is adapter.refine_spa:
                image = matched.T.reshape(1, -1, height, width)
                weight = convolve(image)[0].mean(dim=0)
                if weight.shape != adapter.token_map:  # nearest position of each token
                    weight = F.interpolate(weight[None, None], adapter.token_map)[0, 0]
                weight = weight.flatten()
            else:
                weight = convolve(matched[None])[0].mean(dim=1)
            weighted.append(weight[:, None] * half)
        refined.append(x + adapter.scale * torch.cat(weighted, dim=1))
    return torch.stack(refined)


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        ((2, 3), None),
        ((2, 3), (3, 5)),
        (4, 16),
        (4, (3, 4)),
        (1, (2, 1)),
        ((3, 1), (5, 2)),
        ((2, 3), (2, 3)),
        ((4, 6), (2, 3)),
        ((3, 8), (3, 2)),
    ],
    ids=str,
)
def test_sizes_and_definition(tokens, positions):
    adapter = small(tokens=tokens, positions=positions).double().eval()
    count = adapter.token_map[0] * adapter.token_map[1]
    places = adapter.feature_map[0] * adapter.feature_map[1]
    given = inputs(3, count, places, torch.float64)
    torch.testing.assert_close(adapter(*given), by_definition(adapter, *given))
    assert adapter(*(value[:0] for value in given)).shape == (0, count, 8)


def test_folded_norms_follow_every_change():
    """Evaluation without gradients keeps the convolutions with the norms in them."""
    adapter = small().double()
    given = inputs(2, dtype=torch.float64)

    def check() -> None:
        with torch.no_grad():
            folded = adapter(*given)
        torch.testing.assert_close(folded, adapter(*given))

    adapter.train()(*given)  # statistics move
    adapter.eval()
    check()
    check()
    with torch.no_grad():
        for name, value in [*adapter.named_parameters(), *adapter.named_buffers()]:
            if name.startswith("refine_spa") and value.is_floating_point():
                value.add_(torch.rand_like(value))
                check()
    adapter.load_state_dict(small(spatial_dim=6).double().state_dict())
    check()
    copied = copy.deepcopy(adapter)
    weight = adapter.refine_spa.get_parameter("0.weight")
    weight.data = torch.zeros_like(weight)
    check()
    with torch.no_grad():
        assert not torch.equal(copied(*given), adapter(*given))
    adapter.refine_spa[4].train()
    check()
    adapter.refine_spa[1] = nn.Identity()
    adapter.refine_spa[4].eval()
    check()
    with torch.inference_mode():
        torch.testing.assert_close(adapter(*given), adapter(*given))


def test_paper_sizes_are_the_defaults():
    adapter = AreAdapter()
    assert adapter.token_map == (14, 14)
    assert adapter.feature_map == (28, 28)
    assert adapter.scale.item() == pytest.approx(0.01)
    assert adapter.refine_spa[0].weight.shape == (256, 512, 3, 3)
    assert adapter.refine_spe[0].weight.shape == (196, 512, 1)
    assert adapter.spe_match_attn.to_q.weight.shape == (392, 512)


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_of_one_trains(batch):
    adapter = small().train()
    tokens, spatial, spectral = inputs(batch)
    refined = adapter(tokens.requires_grad_(), spatial, spectral)
    assert refined.shape == (batch, 6, 8)
    refined.square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_no_gradient_reaches_the_match():
    adapter = small().train()
    tokens, spatial, spectral = (value.requires_grad_() for value in inputs(2))
    adapter(tokens, spatial, spectral).square().sum().backward()
    assert spatial.grad is None
    assert spectral.grad is None
    for name, parameter in adapter.named_parameters():
        assert parameter.requires_grad
        assert (parameter.grad is None) == ("match_attn" in name), name


def test_keys_are_projected_once_for_all_blocks():
    adapter = small().eval()
    tokens, spatial, spectral = inputs(2)
    keys = adapter.project_keys(spatial, spectral)
    assert [tuple(key.shape) for key in keys] == [(2, 24, 3), (2, 6, 12)]
    once = adapter.refine(tokens, keys)
    assert torch.equal(once, adapter(tokens, spatial, spectral))
    twice = adapter.refine(once, keys)
    assert torch.equal(twice, adapter(once, spatial, spectral))


def published(adapter: AreAdapter) -> dict[str, Tensor]:
    """Its state under published names, with the tensors it leaves out."""
    state = adapter.state_dict()
    found = {
        name: where.of(state[where.name]) for name, where in official_parameters(adapter).items()
    }
    for name in [name for name in found if name.endswith("to_kv.weight")]:
        found[name] = torch.cat([found[name], torch.full_like(found[name], 7.0)])
    return found | {name: torch.zeros(shape) for name, shape in official_inert(adapter).items()}


def test_published_state_loads():
    adapter, other = small().eval(), small().eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    other.load_state_dict(published(adapter))
    assert torch.equal(adapter(*inputs(2)), other(*inputs(2)))
    another = small().eval()
    another.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter(*inputs(2)), another(*inputs(2)))


def test_published_tensors_without_effect():
    assert official_inert(AreAdapter()) == {
        "spa_mlp.weight": (196, 784),
        "spa_mlp.bias": (196,),
        "spe_mlp.weight": (196, 512),
        "spe_mlp.bias": (196,),
        "spa_match_attn.to_out.weight": (512, 256),
        "spe_match_attn.to_out.weight": (512, 392),
    }


def test_compiles_without_a_break():
    adapter = small().train()
    tokens, spatial, spectral = inputs(2)
    tokens.requires_grad_()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens, spatial, spectral), adapter(tokens, spatial, spectral)
    )
    compiled(tokens, spatial, spectral).sum().backward()
    assert tokens.grad is not None


def test_autocast_stays_close():
    adapter = small().eval()
    given = inputs(2)
    keys = adapter.project_keys(*given[1:])
    # The same match on both sides: rounding may choose another token where two are nearly equal.
    adapter.match = lambda *_: fixed  # type: ignore[method-assign]
    fixed = AreAdapter.match(adapter, given[0], keys)
    exact = adapter.refine(given[0], keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = adapter.refine(given[0], keys)
    assert refined.dtype == torch.float32
    difference = F.mse_loss(refined, exact).sqrt() / exact.std()
    assert difference < 1e-2
    refined.sum().backward()


def test_nan_token_reaches_the_output():
    adapter = small().eval()
    tokens, spatial, spectral = inputs(2)
    tokens[0, 4, 1] = torch.nan
    refined = adapter(tokens, spatial, spectral)
    assert refined[0, :, :4].isnan().all()
    assert refined[1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 6}, "embed_dim: got 6, expected a positive multiple of 4"),
        ({"tokens": 5}, "tokens: got 5, expected a square number"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"tokens": (0, 3)}, "height of tokens: got 0"),
        ({"positions": 25}, r"positions: got a map of \(5, 5\), which halves to \(3, 3\)"),
        ({"positions": 24}, "positions: got 24, expected a square number"),
        ({"spatial_dim": 0}, "spatial_dim: got 0"),
    ],
    ids=str,
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 7, 8), r"tokens: got shape \[2, 7, 8\], expected \[2, 6, 8\]"),
        (0, (1, 6, 8), "tokens: got shape"),
        (1, (2, 23, 6), r"spatial: got shape \[2, 23, 6\], expected \[batch, 24, 6\]"),
        (2, (2, 24, 6), "spectral: got shape"),
    ],
)
def test_bad_inputs(position, shape, message):
    given = list(inputs(2))
    given[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        small()(*given)
