"""Golden files of the attribute-refined adapter."""

from __future__ import annotations

import torch

from spectralx_kernels.refine import AreAdapter
from tests.golden.golden import Arrays, Golden


def run(golden: Golden) -> Arrays:
    inputs = golden.meta["inputs"]
    _, with_class, width = inputs["x"]
    _, positions, spatial_dim = inputs["spatial"]
    adapter = AreAdapter(width, with_class - 1, spatial_dim=spatial_dim, positions=positions)
    adapter.load_state_dict(golden.state_dict())
    adapter.train(golden.meta["train"])
    x = golden.input("x").requires_grad_()
    spatial, spectral = golden.input("spatial"), golden.input("spectral")
    y = torch.cat([x[:, :1], adapter(x[:, 1:], spatial, spectral)], dim=1)
    y.backward(golden.input("gy"))
    assert x.grad is not None
    matches = adapter.match(x[:, 1:], adapter.project_keys(spatial, spectral))
    return {
        "y": y[:, ::4, ::8],
        "dx": x.grad[:, ::4, ::8],
        "match_spatial": matches[0],
        "match_spectral": matches[1],
        "y_norm": y.norm(),
        "dx_norm": x.grad.norm(),
        **golden.gradients(adapter),
    }


HANDLERS = {"Are-adapter": run}
