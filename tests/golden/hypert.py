"""Golden files of the tokenizer, alone and with its low-rank path."""

from __future__ import annotations

from spectralx_kernels.hypert import HyperT, SpatialSpectralTokenizer
from tests.golden.golden import Arrays, Golden


def run_low_rank(golden: Golden) -> Arrays:
    meta = golden.meta
    _, _, height, width = meta["inputs"]["x"]["shape"]
    hypert = HyperT(
        meta["in_channels"],
        meta["wavelengths_um"],
        embed_dim=meta["embed_dim"],
        image_size=(height, width),
        low_rank=meta["hidden_dim"],
    )
    hypert.load_state_dict(golden.state_dict())
    hypert.train(meta["train"])
    tokens, _, _ = hypert(golden.input("x"))
    grid = height // 16, width // 16
    return {"y": tokens.transpose(1, 2).unflatten(2, grid)}


def run(golden: Golden) -> Arrays:
    meta = golden.meta
    tokenizer = SpatialSpectralTokenizer(
        meta["in_channels"],
        meta["wavelengths_um"],
        embed_dim=meta["embed_dim"],
        image_size=meta["img_size"],
        tokens=meta["num_tokens"],
        stem_dim=meta["stem_dim"],
        resolution=meta["input_res"],
    )
    tokenizer.load_state_dict(golden.state_dict())
    tokenizer.train(meta["train"])
    x = golden.input("x").requires_grad_()
    tokens, spatial, spectral = tokenizer(x)
    tokens.backward(golden.input("gy"))
    assert x.grad is not None
    step = meta["subsample"]
    return {
        "tokens": tokens[:, ::step, ::step],
        "spatial": spatial[:, ::step, ::step],
        "spectral": spectral[:, ::step, ::step],
        "dx": x.grad[:, :, ::step, ::step],
        "tokens_norm": tokens.norm(),
        "dx_norm": x.grad.norm(),
        **golden.gradients(tokenizer),
    }


# The longer beginning first: both files' modules begin with "HyperT".
HANDLERS = {"HyperT with low-rank": run_low_rank, "HyperT": run}
