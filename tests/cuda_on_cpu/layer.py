"""The whole AoMoA layer on the pretended device: our kernels, with torch for the vendor's products.

The calls stand in the order of csrc/cuda/aomoa/aomoa.cpp.
"""

from __future__ import annotations

import ctypes
import re
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cuda_on_cpu.build import ROOT
from tests.cuda_on_cpu.device import TYPE_CODES, Device


def _fields() -> list[tuple[str, type]]:
    """Members of SpectralxAomoa, read from its declaration."""
    text = (ROOT / "csrc" / "cuda" / "aomoa" / "kernels.h").read_text()
    body = text.split("struct SpectralxAomoa {")[1].split("};")[0]
    fields: list[tuple[str, type]] = []
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        pointer = "*" in declaration
        kind = ctypes.c_double if "double" in declaration else ctypes.c_int64
        names = re.sub(r"\b(const|void|int64_t|double)\b|\*", "", declaration).split(",")
        fields += [(name.strip(), ctypes.c_void_p if pointer else kind) for name in names]
    return fields


class Layer(ctypes.Structure):
    """SpectralxAomoa of kernels.h."""

    _fields_ = _fields()


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

    def __init__(self, library: ctypes.CDLL, w: Weights, dense: bool) -> None:
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
            experts=self.experts, top_k=w.top_k, dense=int(dense), eps=w.norm_eps,
        )  # fmt: skip
        for name in Weights._fields[:-2]:
            if name not in ("weight", "bias") and getattr(w, name) is not None:
                self.bind(name, self.device.put(getattr(w, name)))

    def bind(self, name: str, tensor: Tensor | None) -> None:
        """Point the member `name` to `tensor`; it has to stay alive, as the device's do."""
        setattr(self.layer, name, tensor.data_ptr() if tensor is not None else None)

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An output or scratch buffer, full of NaN, bound to the member `name`."""
        tensor = self.device.empty(shape, dtype)
        self.bind(name, tensor)
        return tensor

    def put(self, name: str, tensor: Tensor) -> None:
        """A result of the vendor's, bound to the member `name`."""
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


def forward(library: ctypes.CDLL, w: Weights, dense: bool = False) -> Forward:
    """The operator's five outputs."""
    s = Session(library, w, dense)
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
