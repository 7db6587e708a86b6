"""Stage 1 of both families: one step with every adapter, and a curve of twenty steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spectralx.adapt import Method
from spectralx.reconstruction import MaskedReconstruction
from spectralx_kernels import official_parameters
from tests.golden.golden import Arrays, Golden

ADAPTER: dict[str | None, Method | None] = {
    None: None,
    "lora": "lora",
    "low-rank-scaling": "slr",
    "spectral_adaptation": "aomoa",
}


def build(golden: Golden) -> MaskedReconstruction:
    """The model a file describes, with the file's tensors."""
    meta = golden.meta
    heads: dict[str, Any] = {} if meta["fcn_dim"] is None else {"fcn_dim": meta["fcn_dim"]}
    model = MaskedReconstruction(
        meta["family"],
        in_channels=meta["in_channels"],
        wavelengths=meta["wavelengths_um"],
        adapter=ADAPTER[meta["adapter"]],
        image_size=meta["img_size"],
        patch_size=meta["patch_size"],
        embed_dim=meta["embed_dim"],
        depth=meta["depth"],
        num_heads=meta["num_heads"],
        decoder_embed_dim=meta["decoder_embed_dim"],
        decoder_depth=meta["decoder_depth"],
        decoder_num_heads=meta["decoder_num_heads"],
        mask_ratio=meta["mask_ratio"],
        resolution=meta["input_res"],
        **heads,
    )
    missing, unexpected = model.load_state_dict(golden.state_dict(), strict=False)
    assert not unexpected, f"{golden.name}: no place for {unexpected}"
    left = [name for name in missing if not name.endswith("num_batches_tracked")]
    assert not left, f"{golden.name}: not loaded: {left}"
    return model


def trainable_names(model: MaskedReconstruction) -> set[str]:
    """Published names of the parameters that train."""
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name, where in official_parameters(model).items() if where.name in own}


def step(golden: Golden) -> Arrays:
    model = build(golden).train(golden.meta["train"])
    expected, found = set(golden.meta["trainable"]), trainable_names(model)
    assert found == expected, (
        f"{golden.name}: trains {sorted(found - expected)}, freezes {sorted(expected - found)}"
    )
    images = golden.input("x")
    with golden.gate_noise():
        result = model(images, golden.mask_noise(0, (images.shape[0], model.patches)))
    result.loss.backward()
    return {
        "loss": result.loss,
        "mask": result.mask.numpy().astype(np.uint8),
        "pred": result.prediction[:, ::7, ::13],
        **golden.gradients(model),
    }


def curve(golden: Golden) -> Arrays:
    model = build(golden).train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=1e-4,
    )
    losses = []
    with golden.gate_noise():
        for index in range(golden.meta["steps"]):
            images = golden.input(f"x{index}", "x<i>")
            noise = golden.mask_noise(index, (images.shape[0], model.patches))
            loss = model(images, noise).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": np.array(losses)}


HANDLERS = {"masked reconstruction": step, "stage-1 training curve": curve}
