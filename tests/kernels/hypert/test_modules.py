"""`HyperT` as a module: sizes, names, what trains, modes, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import SavedBytes
from spectralx_kernels.hypert import HyperT, SpatialSpectralTokenizer
from tests.kernels import ladder

SMALL: dict[str, Any] = {"embed_dim": 12, "stem_dim": 16, "num_heads": 4}


def wavelengths(bands: int) -> list[float]:
    return [0.4 + 2.0 * band / bands for band in range(bands)]


def small(bands: int = 3, **options: Any) -> HyperT:
    torch.manual_seed(0)
    return HyperT(bands, wavelengths(bands), **({"image_size": (32, 48)} | SMALL | options))


def images(count: int, bands: int, size: tuple[int, int], dtype: Any = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count + bands)
    return torch.rand(count, bands, *size, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((8, 8), 1), ((8, 24), 3), ((40, 24), 5), ((24, 56), 7), ((40, 40), None)],
    ids=str,
)
def test_any_multiple_of_8(size, tokens):
    """Maps of odd sides too, whose windows do not divide them and whose area has few divisors."""
    model = small(image_size=size, tokens=tokens, low_rank=None).eval()
    found, spatial, spectral = model(images(2, 3, size))
    positions = size[0] // 8 * (size[1] // 8)
    assert found.shape == (2, tokens or 9, 12)
    assert spatial.shape == (2, positions, 16)
    assert spectral.shape == (2, 16, positions)
    assert all(out.isfinite().all() for out in (found, spatial, spectral))


@pytest.mark.parametrize("bands", [1, 2, 65, 512])
def test_any_number_of_bands(bands):
    model = small(bands, image_size=16).train()
    found = model(images(2, bands, (16, 16)))[0]
    assert found.shape == (2, 1, 12)
    assert found.isfinite().all()


def test_paper_sizes_are_the_defaults():
    with torch.device("meta"):
        model = HyperT(13, wavelengths(13))
    assert model.proj.spa_query.shape == (196, 512)
    assert model.proj.spatial_positions.shape == (784, 512)
    assert model.proj.spectral_positions.shape == (512, 784)
    attention = {
        name: (module.window, module.num_heads)
        for name, module in model.proj.named_modules()
        if name.endswith("attn") and hasattr(module, "window")
    }
    assert attention == {
        "spa_semantic_module.0.attn": ((14, 14), 8),
        "spe_semantic_module.0.attn": ((1, 512), 8),
    }
    assert model.up.weight.shape == (1024, 16, 4, 4)


def test_order_and_repetition_of_wavelengths():
    x = images(1, 3, (32, 48))
    results = []
    for values in ([0.8, 0.4, 0.4], [0.4, 0.4, 0.8]):
        torch.manual_seed(0)
        model = HyperT(3, values, image_size=(32, 48), **SMALL).eval()
        results.append(model(x))
    assert torch.equal(results[0][1], results[1][1])  # the spatial branch does not see them
    assert not torch.allclose(results[0][2], results[1][2])
    torch.manual_seed(0)
    nanometres = HyperT(
        3, torch.tensor([800, 400, 400]), wavelength_unit="nm", image_size=(32, 48), **SMALL
    ).eval()
    torch.testing.assert_close(nanometres(x)[0], results[0][0])


def test_an_image_does_not_depend_on_its_batch():
    model = small().double().eval()
    x = images(3, 3, (32, 48), torch.float64)
    for whole, alone in zip(model(x), model(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone)
    assert [tuple(out.shape) for out in model(x[:0])] == [(0, 6, 12), (0, 24, 16), (0, 16, 24)]


def test_low_rank_path_is_added_and_scaled():
    model = small().eval()
    x = images(2, 3, (32, 48))
    with torch.no_grad():
        model.scaler.copy_(torch.linspace(0.5, 2, 12))
        patches = model.up(model.down(x))  # [B, D, 2, 3]
        tokens = model.proj(x)[0]
        expected = [
            model.scaler * (tokens[:, row * 3 + column] + patches[:, :, row, column])
            for row in range(2)
            for column in range(3)
        ]
        torch.testing.assert_close(model(x)[0], torch.stack(expected, dim=1))


def test_low_rank_path_sees_zeros_beyond_the_edge():
    model = small(image_size=(40, 24)).eval()
    x = images(2, 3, (40, 24))
    whole = torch.zeros(2, 3, 48, 32)
    whole[:, :, :40, :24] = x
    with torch.no_grad():
        found = model(x)[0]
        expected = model.proj(x)[0] + model.up(model.down(whole)).flatten(2).mT
    assert found.shape == (2, 6, 12)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("patch", "first"), [(1, 1), (2, 2), (4, 4), (8, 4), (32, 4)])
def test_low_rank_path_of_other_patches(patch, first):
    """A token's part of the path sees its own patch alone."""
    side = 64 // patch if patch > 8 else 2
    size = max(patch * side, 8)
    side = size // patch
    model = small(image_size=size, patch_size=patch)
    assert model.down.stride == (first, first)
    x = images(1, 3, (size, size))
    with torch.no_grad():
        model.scaler.fill_(2.0)
        found = model.eval()(x)[0] / 2 - model.proj(x)[0]
        for index in (0, side + 1, side * side - 1):
            rows, columns = (slice(at * patch, (at + 1) * patch) for at in divmod(index, side))
            alone = model.up(model.down(x[:, :, rows, columns]))
            torch.testing.assert_close(found[:, index], alone.flatten(1), rtol=1e-4, atol=1e-5)


def test_queries_are_projected_once_for_all_images():
    model = small().eval()
    seen: list[tuple[int, ...]] = []
    for match in (model.proj.spa_match_attn, model.proj.spe_match_attn):
        match.to_q.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    model(images(5, 3, (32, 48)))
    assert seen == [(6, 8), (6, 12)]


def test_official_trains_the_low_rank_path_and_the_scaler():
    model = small()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"scaler", "down.weight", "down.bias", "up.weight", "up.bias"}
    assert all(p.requires_grad for p in small(trainable="all").parameters())
    model(images(2, 3, (32, 48)))[0].square().sum().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())
    everything = small(trainable="all")
    everything(images(2, 3, (32, 48)))[0].square().sum().backward()
    assert all(p.grad is not None for p in everything.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_frozen_tokenizer_saves_nothing(training):
    """What is kept is the low-rank path's: its hidden map, and the sum before the scaler."""
    model = small().train(training)
    x = images(2, 3, (32, 48))
    with SavedBytes([x, *model.parameters(), *model.buffers()]) as saved:
        tokens, spatial, spectral = model(x)
    hidden = model.down.out_channels * 8 * 12
    assert saved.bytes == 4 * 2 * (hidden + tokens[0].numel())
    assert not spatial.requires_grad
    assert not spectral.requires_grad


def test_a_frozen_stem_finds_no_weight_gradients():
    """Where the images alone want a gradient no convolution is differentiated by its weight."""
    stem = small().proj.downsample_module
    masks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.spectralx.residual_halving_backward.default:
                masks.append(args[-1])
            return func(*args, **(kwargs or {}))

    x = images(2, 3, (32, 48)).requires_grad_()
    out = stem(x).sum()
    with Watch():
        out.backward()
    assert masks == [[True] + [False] * 12] * 2
    assert x.grad is not None


def test_frozen_batch_norms_follow_the_mode():
    model = small()
    mean = model.get_buffer("proj.downsample_module.module1.1.running_mean")
    model.eval()(images(2, 3, (32, 48)))
    assert torch.equal(mean, torch.zeros(64))
    model.train()(images(2, 3, (32, 48)))
    assert not torch.equal(mean, torch.zeros(64))


def test_running_statistics_are_those_of_batch_norm():
    """After two steps; one norm of the four is kept in evaluation."""
    stem = small(trainable="all").proj.downsample_module.double().train()
    plain = copy.deepcopy(stem)
    stem.module3[1].eval()
    plain.module3[1].eval()
    for count in (2, 3):
        x = images(count, 3, (32, 48), torch.float64)
        y = plain.conv1(x)
        y = plain.module2(y + plain.module1(y))
        y = plain.conv2(plain.module4(y + plain.module3(y)))
        torch.testing.assert_close(stem(x), y)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(stem.get_buffer(name), buffer)


def test_other_norms_run_as_they_are():
    stem = small().proj.downsample_module.double().train()
    expected = stem(images(2, 3, (32, 48), torch.float64))
    for path in ("module1.1", "module2.1", "module3.1", "module4.1"):
        norm = stem.get_submodule(path)
        stem.set_submodule(path, torch.nn.Sequential(norm))
    torch.testing.assert_close(stem(images(2, 3, (32, 48), torch.float64)), expected)


def test_state_dict_round_trip_without_tables():
    model = small()
    state = model.state_dict()
    assert not any("positions" in name for name in state)
    other = small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    # Published files made before torch counted batches lack the counters.
    other.load_state_dict({k: v for k, v in state.items() if "num_batches" not in k})
    x = images(1, 3, (32, 48))
    assert torch.equal(model.eval()(x)[0], other.eval()(x)[0])
    bare = SpatialSpectralTokenizer(3, wavelengths(3), image_size=(32, 48), **SMALL)
    bare.load_state_dict(model.proj.state_dict())


def test_compiles_without_a_break():
    model = small()
    x = images(2, 3, (32, 48))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for plain, other in zip(model(x), compiled(x), strict=True):
        torch.testing.assert_close(plain, other)
    compiled(x)[0].sum().backward()
    assert model.up.weight.grad is not None


def test_autocast_stays_close():
    model = small(trainable="all").eval()
    x = images(2, 3, (32, 48))
    exact = model.double()(x.double())[0]
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model(x)[0]
    assert ladder.relative_error(tokens, exact) < 0.05
    tokens.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nan_pixel_reaches_every_token_of_its_image():
    model = small().eval()
    x = images(2, 3, (32, 48))
    x[0, 1, 5, 7] = torch.nan
    tokens = model(x)[0]
    assert tokens[0].isnan().all()
    assert tokens[1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels: got 0, expected 1 to 512"),
        ({"in_channels": 513}, "in_channels: got 513, expected 1 to 512"),
        ({"wavelengths": [0.5]}, "wavelengths: got shape"),
        ({"image_size": 100}, "image_size: got 100 x 100, expected positive multiples of 8"),
        ({"image_size": (0, 16)}, "image_size: got 0 x 16"),
        ({"patch_size": 8, "image_size": 24, "tokens": 5}, "tokens: got 5, expected 9, one for"),
        ({"patch_size": 6, "image_size": 24}, "patch_size: got 6, expected 1, 2 or a multiple"),
        ({"patch_size": 0}, "patch_size: got 0, expected 1, 2 or a multiple of 4"),
        ({"tokens": 5}, "tokens: got 5, expected 1, one for each patch"),
        ({"tokens": 0, "low_rank": None}, "tokens: got 0"),
        ({"embed_dim": 7}, "embed_dim: got 7"),
        ({"stem_dim": 18}, "stem_dim: got 18"),
        ({"num_heads": 3}, "stem_dim: got 16, expected a positive multiple of 4 and of num_heads"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"low_rank": 0}, "low_rank: got 0"),
        ({"trainable": "some"}, "trainable: got 'some'"),
    ],
    ids=str,
)
def test_bad_sizes(options, message):
    valid: dict[str, Any] = {"in_channels": 3, "wavelengths": wavelengths(3), "image_size": 16}
    given = valid | SMALL | options
    if options.get("in_channels"):
        given["wavelengths"] = wavelengths(given["in_channels"])
    with pytest.raises(ValueError, match=message):
        HyperT(**given)


@pytest.mark.parametrize("shape", [(1, 4, 32, 48), (1, 3, 48, 32), (3, 32, 48)], ids=str)
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"images: got shape .*, expected \[batch, 3, 32, 48\]"):
        small()(torch.zeros(shape))
