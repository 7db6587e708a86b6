"""The whole AoMoA layer on the pretended device: our kernels, with torch for the vendor's products.

The calls stand in the order of csrc/cuda/aomoa/aomoa_op.cpp.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cuda_on_cpu.build import ROOT
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.structure import structure

Layer = structure(ROOT / "csrc" / "cuda" / "aomoa" / "kernels.h", "SpectralxAomoa")


class Weights(NamedTuple):
    """Arguments of the operator by name, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scaler: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    down: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    gate: Tensor
    gate_noise: Tensor
    noise: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    up: Tensor
    top_k: int
    norm_eps: float


class Forward(NamedTuple):
    out: Tensor
    gates: Tensor
    load: Tensor
    normed: Tensor
    statistics: Tensor


class Session:
    """One call of the layer: its device, its arguments there, the filled structure."""

    def __init__(self, library: ctypes.CDLL, w: Weights, dense: bool, tile: int) -> None:
        self.device = Device(library)
        self.library = library
        self.w = w
        self.dtype = w.x.dtype
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.attributes, self.rank, self.experts = w.gate.shape
        self.tokens, width = w.x.shape
        self.width, self.out = width // self.attributes, w.weight.shape[0] // self.attributes
        self.hidden = w.fc1_weight.shape[1]
        self.rows = self.tokens * self.attributes
        self.layer = Layer(
            type=TYPE_CODES[self.dtype], tokens=self.tokens, attributes=self.attributes,
            width=self.width, out=self.out, rank=self.rank, hidden=self.hidden,
            experts=self.experts, top_k=w.top_k, dense=int(dense), tile=tile, eps=w.norm_eps,
        )  # fmt: skip
        for name in Weights._fields[:-2]:
            value = getattr(w, name)
            if name not in ("weight", "bias") and value is not None:
                self.put(name, value.to(self.wide) if name == "noise" else value)

    def bind(self, name: str, tensor: Tensor | None) -> None:
        """Point the member `name` to `tensor`; it has to stay alive, as the device's do."""
        setattr(self.layer, name, tensor.data_ptr() if tensor is not None else None)

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An output or scratch buffer, full of NaN, bound to the member `name`."""
        tensor = self.device.empty(shape, dtype)
        self.bind(name, tensor)
        return tensor

    def put(self, name: str, tensor: Tensor) -> None:
        """A copy on the device, bound to the member `name`."""
        self.bind(name, self.device.put(tensor))

    def count(self, name: str) -> int:
        """An int64 function of the structure."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return int(function(ctypes.byref(self.layer)))

    def run(self, name: str) -> None:
        self.device.run(name, ctypes.byref(self.layer))

    def prepare(self) -> tuple[Tensor, Tensor]:
        """The folded weights [r, d] and [A, o, r]."""
        folded = self.make("folded", (self.rank, self.width), self.dtype)
        scaled_up = self.make("scaled_up", (self.attributes, self.out, self.rank), self.dtype)
        self.make("column_sums", (self.rank,), self.wide)
        self.make("shift", (self.rank,), self.wide)
        self.counter = torch.full((1,), 77, dtype=torch.int32)
        self.bind("counter", self.counter)
        self.run("spectralx_aomoa_prepare")
        return folded, scaled_up


def forward(library: ctypes.CDLL, w: Weights, dense: bool = False, tile: int = 0) -> Forward:
    """The operator's five outputs."""
    s = Session(library, w, dense, tile)
    statistics = s.make("statistics", (3, s.attributes, s.tokens), s.wide)
    folded, scaled_up = s.prepare()
    # The vendor's, with float accumulation and output.
    s.put("products", w.x.view(s.rows, s.width).to(s.wide) @ folded.T.to(s.wide))
    normed = s.make("normed", (s.tokens, s.attributes, s.rank), s.wide)
    mixed = s.make("mixed", (s.tokens, s.attributes, s.rank), s.dtype)
    gates = s.make("gates", (s.attributes, s.tokens, s.experts), s.wide)
    load = s.make("load", (s.attributes, s.experts), s.wide)
    blocks = s.count("spectralx_aomoa_forward_blocks")
    s.make("load_partial", (blocks, s.attributes, s.experts), s.wide)
    s.run("spectralx_aomoa_forward")
    out = torch.nn.functional.linear(w.x, w.weight, w.bias)
    adapted = torch.bmm(mixed.transpose(0, 1).to(s.wide), scaled_up.transpose(1, 2).to(s.wide))
    out = (out.to(s.wide) + adapted.transpose(0, 1).flatten(1)).to(s.dtype)
    return Forward(out, gates, load, normed, statistics)


TRAINED = (
    "scaler", "norm1_weight", "norm1_bias", "down", "norm2_weight", "norm2_bias", "gate",
    "gate_noise", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "up",
)  # fmt: skip


def backward(
    library: ctypes.CDLL,
    w: Weights,
    kept: Forward,
    out_grad: Tensor,
    gates_grad: Tensor | None,
    load_grad: Tensor | None,
    dense: bool = False,
    tile: int = 0,
    splits: int = 0,
) -> dict[str, Tensor]:
    """Gradients of x, of the noise and of every trained weight, by name."""
    s = Session(library, w, dense, tile)
    rows, wide, dtype = s.rows, s.wide, s.dtype
    per_row = s.experts if dense else w.top_k
    s.put("normed", kept.normed)
    folded, scaled_up = s.prepare()  # before `statistics` is bound: no row statistics
    s.put("statistics", kept.statistics)
    by_attribute = out_grad.view(s.tokens, s.attributes, s.out).transpose(0, 1)  # [A, T, o]
    s.put("mixed_grad", torch.bmm(by_attribute.to(wide), scaled_up.to(wide)).to(dtype))
    for name, grad in (("gates_grad", gates_grad), ("load_grad", load_grad)):
        if grad is not None:
            s.put(name, grad)
    mixed = s.make("mixed", (s.tokens, s.attributes, s.rank), dtype)
    normed_grad = s.make("normed_grad", (rows, s.rank), dtype)
    s.make("hidden_rows", (rows, per_row, s.hidden), dtype)
    s.make("hidden_grad", (rows, per_row, s.hidden), dtype)
    s.make("output_grad", (rows, per_row, s.rank), dtype)
    s.make("router_grad", (rows, 2 * s.experts), dtype)
    s.make("z_grad", (rows, s.rank), wide)
    s.make("row_terms", (rows, 2), wide)
    grads = {}
    if w.noise is not None:
        grads["noise"] = s.make("noise_grad", (s.attributes, s.tokens, s.experts), wide)
    s.layer.row_blocks = s.count("spectralx_aomoa_backward_blocks")
    s.make("norm_partial", (s.layer.row_blocks, 4, s.rank), wide)
    slots = torch.full((rows, per_row), 99, dtype=torch.int16)
    s.bind("slots", slots)
    s.run("spectralx_aomoa_backward")
    s.layer.splits = splits or s.count("spectralx_aomoa_splits")
    size = s.count("spectralx_aomoa_partial_size")
    s.make("weight_partial", (s.layer.splits, size), wide)
    s.run("spectralx_aomoa_gradients")
    # The vendor's.
    x = w.x.view(rows, s.width).to(wide)
    s.put(
        "up_products",
        torch.bmm(by_attribute.transpose(1, 2).to(wide), mixed.transpose(0, 1).to(wide)),
    )
    s.put("down_products", normed_grad.T.to(wide) @ x)
    x_grad = s.make("x_grad", tuple(w.x.shape), dtype)
    frozen = (out_grad @ w.weight).view(rows, s.width)
    x_grad.copy_(
        (frozen.to(wide) + normed_grad.to(wide) @ folded.to(wide)).to(dtype).view_as(x_grad)
    )
    for name in TRAINED:
        grads[name] = s.make(f"{name}_grad", tuple(getattr(w, name).shape), dtype)
    s.run("spectralx_aomoa_finish")
    return {"x": x_grad, **grads}
