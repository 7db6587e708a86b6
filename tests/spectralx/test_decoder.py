from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spectralx.decoder import ConvUnit, MultiLevelNeck, UPerHead, UPerNet, set_plain


def decoder(**options) -> UPerNet:
    torch.manual_seed(0)
    return UPerNet([24] * 4, 5, neck_channels=16, head_channels=8, **options)


def maps(batch: int = 2, rows: int = 6, columns: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 24, rows, columns, generator=generator) for _ in range(4)]


def test_names_are_those_of_mmsegmentation():
    names = set(decoder().state_dict())
    assert {
        "neck.lateral_convs.3.conv.bias",
        "neck.convs.0.conv.weight",
        "head.psp_modules.3.1.bn.running_var",
        "head.bottleneck.conv.weight",
        "head.lateral_convs.2.bn.bias",
        "head.fpn_convs.2.conv.weight",
        "head.fpn_bottleneck.bn.weight",
        "head.conv_seg.bias",
    } <= names
    assert not any(
        "bn" not in name and name.startswith("head.") and name.endswith("conv.bias")
        for name in names
    )
    assert not any(name.startswith(("head.lateral_convs.3", "head.fpn_convs.3")) for name in names)


def test_logits_are_four_times_the_features():
    assert decoder()(maps()).shape == (2, 5, 24, 16)


def test_neck_is_resize_between_two_convolutions():
    neck = MultiLevelNeck([24] * 4, 16)
    sizes = [(24, 16), (12, 8), (6, 4), (3, 2)]
    for level, (found, x) in enumerate(zip(neck(maps()), maps(), strict=True)):
        lateral, unit = neck.lateral_convs[level], neck.convs[level]
        assert isinstance(unit, ConvUnit)
        resized = F.interpolate(lateral(x), size=sizes[level], mode="bilinear")
        expected = F.conv2d(resized, unit.conv.weight, unit.conv.bias, padding=1)
        torch.testing.assert_close(found, expected)


def test_one_pixel_and_odd_maps():
    """A 1x1 feature map halves to 1x1, a 5x3 one to 2x1."""
    assert [x.shape[-2:] for x in MultiLevelNeck([24] * 4, 16)(maps(rows=1, columns=1))] == [
        (4, 4),
        (2, 2),
        (1, 1),
        (1, 1),
    ]
    assert MultiLevelNeck([24] * 4, 16)(maps(rows=5, columns=3))[3].shape[-2:] == (2, 1)
    assert decoder()(maps(rows=5, columns=3)).shape == (2, 5, 20, 12)


def test_unit_of_several_maps_is_that_of_their_concatenation():
    unit = ConvUnit(12, 8, 3)
    assert unit.bn is not None
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 8, 6, 6, generator=generator)
    small = torch.randn(2, 4, 3, 3, generator=generator)
    joined = torch.cat([wide, F.interpolate(small, size=(6, 6), mode="bilinear")], dim=1)
    expected = F.relu(unit.bn(F.conv2d(joined, unit.conv.weight, padding=1)))
    torch.testing.assert_close(unit(wide, small), expected)


def test_top_down_path_adds_the_coarser_map():
    """A change of the coarsest map reaches every level; without it, only the top one."""
    torch.manual_seed(0)
    head = UPerHead([8] * 4, 8, 3).eval()
    generator = torch.Generator().manual_seed(3)
    pyramid = [torch.randn(2, 8, side, side, generator=generator) for side in (8, 4, 2, 1)]
    seen: dict[int, list[torch.Tensor]] = {}
    for level, conv in enumerate(head.fpn_convs):
        conv.register_forward_pre_hook(
            lambda module, inputs, level=level: seen.setdefault(level, []).append(inputs[0])
        )
    head(pyramid)
    head([*pyramid[:3], pyramid[3] + 1])
    for before, after in seen.values():
        assert not torch.allclose(before, after)


def test_dropout_drops_whole_channels_in_training_only():
    model = decoder(dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(model(maps()), model(maps()))
    model.eval()
    assert torch.equal(model(maps()), model(maps()))


def test_a_batch_of_one_trains_only_without_the_global_pool():
    with pytest.raises(ValueError, match="images: got a batch of 1 in training"):
        decoder()(maps(batch=1))
    assert decoder().eval()(maps(batch=1)).shape == (1, 5, 24, 16)
    assert decoder(pool_scales=(2, 3))(maps(batch=1)).shape == (1, 5, 24, 16)


def test_scales_must_match_the_features():
    with pytest.raises(ValueError, match=r"scales: got .*, expected 3 positive numbers"):
        UPerNet([8] * 3, 2, head_channels=8)


def test_every_parameter_gets_a_gradient():
    model = decoder()
    model(maps()).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_plain_path_agrees_forward_and_backward():
    """Training and evaluation, with and without gradients, at a batch where products pay too."""
    for batch in (2, 12):
        model: Any = decoder(dropout=0.0).double()
        images = [each.double() for each in maps(batch)]
        for unit in model.modules():
            if isinstance(unit, torch.nn.BatchNorm2d):
                assert unit.running_mean is not None
                assert unit.running_var is not None
                torch.nn.init.uniform_(unit.running_mean, -0.5, 0.5)
                torch.nn.init.uniform_(unit.running_var, 0.5, 2.0)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        results = []
        for plain in (False, True):
            model.load_state_dict(state)
            set_plain(model, plain)
            found = {}
            model.eval()
            with torch.no_grad():
                found["kept"] = model(images)
            for training in (False, True):
                model.train(training).zero_grad()
                out = model(images)
                out.square().mean().backward()
                found[f"logits {training}"] = out.detach()
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    found[f"{name} {training}"] = parameter.grad.clone()
            found["running"] = model.head.lateral_convs[0].bn.running_var.clone()
            results.append(found)
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name])


def test_kept_product_follows_the_weights():
    """A changed weight, statistic or dtype is seen; the state dict does not hold the product."""
    model: Any = decoder().eval()
    names = set(model.state_dict())
    with torch.no_grad():
        before = model(maps())
        assert model.head.lateral_convs[0]._kept is not None
        assert torch.equal(model(maps()), before)
        for change in (
            lambda: model.neck.convs[0].conv.weight.mul_(2),
            lambda: model.head.lateral_convs[0].bn.running_var.mul_(3),
            lambda: model.head.lateral_convs[0].conv.weight.add_(0.1),
        ):
            change()
            after = model(maps())
            assert not torch.allclose(after, before)
            set_plain(model)
            torch.testing.assert_close(after, model(maps()), rtol=1e-4, atol=1e-5)
            set_plain(model, False)
            before = after
        assert model.double()([each.double() for each in maps()]).dtype == torch.float64
    assert set(model.state_dict()) == names
    with torch.inference_mode():
        assert model.float()(maps()).shape == (2, 5, 24, 16)


def test_kept_product_does_not_depend_on_autocast():
    model: Any = decoder().eval()
    with torch.no_grad():
        plain = model(maps())
        with torch.autocast("cpu", torch.bfloat16):
            after = model(maps())
        model.train().eval()  # forgets
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(maps()), after)
        assert torch.equal(model(maps()), plain)


def test_compiles_whole():
    model = decoder(dropout=0.0).eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(maps()), model(maps()), rtol=1e-4, atol=1e-5)
