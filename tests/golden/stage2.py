"""Golden files of stage 2: logits, loss and gradients of the whole model, and a training curve."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectralx.backbones.dinov3 import DINOv3
from spectralx.checkpoints import load_official
from spectralx.segmentation import Segmentation
from spectralx_kernels import official_inert, official_parameters
from tests.golden.golden import Arrays, Golden

# The published model's tensors that keep their usual start and so are not in the files.
_UNLISTED = ("num_batches_tracked", "pos_embed", "rope_embed.periods", "qkv.bias_mask")
# Published tensors without effect that do not train either.
_INERT_FROZEN = ("vit_backbone.head.", "vit_backbone.mask_token")


class _SkipRandomStarts(TorchFunctionMode):
    """Weights stay unset where the constructor would draw them: every one is loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


def build(golden: Golden) -> Segmentation:
    """The model of the file with its weights, loaded as published checkpoints are."""
    meta = golden.meta
    with _SkipRandomStarts():
        model = Segmentation(
            meta["family"],
            meta["in_channels"],
            meta["num_classes"],
            meta["wavelengths_um"],
            image_size=meta["img_size"],
            patch_size=meta["patch_size"],
            embed_dim=meta["embed_dim"],
            depth=meta["depth"],
            num_heads=meta["num_heads"],
            feature_blocks=meta["feature_blocks"],
            adapted_blocks=[5],
            resolution=meta.get("input_res", 10.0),
            storage_tokens=meta.get("storage_tokens", 4),
            dropout=0.0,
        )
    state = golden.state_dict()
    own = model.state_dict()
    for official, where in official_parameters(model).items():
        if official not in state:
            assert official.endswith(_UNLISTED), f"{golden.name}: holds no {official}"
            state[official] = where.of(own[where.name])
    load_official(model, state)
    return model


def check_trainable(golden: Golden, model: nn.Module) -> None:
    """The parameters that train are those of the published code, name by name."""
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    listed = official_parameters(model).items()
    found = {official for official, where in listed if where.name in own}
    found |= {name for name in official_inert(model) if not name.startswith(_INERT_FROZEN)}
    expected = set(golden.meta["trainable"])
    assert found == expected, (
        f"{golden.name}: trainable: surplus {sorted(found - expected)}, "
        f"missing {sorted(expected - found)}"
    )


def run(golden: Golden) -> Arrays:
    meta = golden.meta
    model = build(golden)
    check_trainable(golden, model)
    model.train(meta["train"])
    images = golden.input("x")
    size = (images.shape[-2], images.shape[-1])
    labels = golden.integers("label", meta["num_classes"], (images.shape[0], *size))
    logits: list[Tensor] = []
    model.head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with golden.gate_noise():
        loss = model.loss(images, labels, ignore_index=meta["ignore_index"])
    loss.backward()
    upsampled = F.interpolate(logits[0].detach(), size=size, mode="bilinear")
    found: Arrays = {
        "logits": upsampled[:, :, ::16, ::16],
        "loss": loss,
        **golden.gradients(model),
    }
    backbone = model.vit_backbone
    if isinstance(backbone, DINOv3):
        found["periods"] = backbone.rope_embed.periods.float()
    else:
        found["pos_embed"] = backbone.pos_embed[0, ::29, ::37]
    return found


def curve(golden: Golden) -> Arrays:
    meta = golden.meta
    model = build(golden).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)
    losses = []
    with golden.gate_noise():
        for step in range(meta["steps"]):
            images = golden.input(f"x{step}", "x<i>")
            coarse = golden.integers(f"label{step}", meta["num_classes"], (images.shape[0], 14, 14))
            labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
            loss = model.loss(images, labels, ignore_index=meta["ignore_index"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


HANDLERS = {
    **{
        f"{family} + HyperT + AoMoA (block 5) + Are-adapter + UPerNet": run
        for family in ("scalemae", "satmae++", "dinov3")
    },
    "stage-2 training curve": curve,
}
