"""Row 5: one wrong argument in a call that is right otherwise.

The public function must raise a TypeError, ValueError or IndexError of one line that begins with
the name of the argument, or of one it disagrees with in size, dtype or device, and must leave
tensors, parameters, buffers and random states as they were, to the byte.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.harden.draws import Draw, arrange
from tests.harden.operators import ENTRIES
from tests.harden.public import PUBLIC, Named
from tests.harden.record import Outcome

# Integers that index something, and the argument whose values they choose from.
INDICES = ("match", "ids", "ids_restore", "target", "prediction")
# Options and values that none of their functions takes.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1, 1000),
    "num_heads": (0, -2, 1001),
    "window": ([0, 1], [2, -1], [3]),
    "keep": (-1, 1000),
    "patch": (0, -1, 1001),
    "grid": ([0, 1], [97, 1], [1]),
    "base_size": ([0, 1], [1]),
    "size": ([0, 3], [3], [1, 2, 3], -1),
    "padding": ([-1, 0], [1]),
    "label_smoothing": (-0.1, 1.5, float("nan")),
    "reduction": ("average", ""),
    "algorithm": ("fast", ""),
}
# Dimensions that no other argument and no option fixes, counted from the front; "leading" are all
# but the last. A single tensor may have any size but where its function asks for a certain one.
FREE: dict[tuple[str, str], tuple[int, ...] | str] = {
    ("noisy_topk_gating", "clean"): (0, 1, 2),
    ("aomoa", "x"): "leading",
    ("window_attention", "qkv"): (0, 1, 2),
    ("attribute_match", "features"): (0, 1),
    ("attribute_match", "queries"): (0,),
    ("norm_linear", "x"): "leading",
    ("norm_linear", "weight"): (0,),
    ("linear", "x"): "leading",
    ("linear", "weight"): (0,),
    ("patch_conv2d", "x"): (0, 2, 3),
    ("patch_conv2d", "weight"): (0, 2, 3),
    ("feed_forward", "x"): "leading",
    ("feed_forward", "fc2_weight"): (0,),
    ("residual_halving", "x"): (0,),
    ("random_masking", "noise"): (0, 1),
    ("gather_tokens", "tokens"): (1, 2),
    ("gather_tokens", "ids"): (1,),
    ("restore_tokens", "tokens"): (1,),
    ("restore_tokens", "ids_restore"): (1,),
    ("upsampled_l1_loss", "prediction"): (2, 3),
    ("upsampled_l1_loss", "images"): (2, 3),
    ("band_reconstruction_loss", "high"): (2, 3),
    ("band_reconstruction_loss", "low"): (2, 3),
    ("band_reconstruction_loss", "images"): (2, 3),
    ("channel_norm", "x"): (0, 2, 3),
    ("channel_norm_conv2d", "x"): (0, 2, 3),
    ("gelu_grouped_conv2d", "x"): (0, 2, 3),
    ("pixel_head", "x"): (0, 2, 3),
    ("pixel_head", "weight of mix"): (0,),
    ("pixel_head", "weight of project"): (1,),
    ("match_argmax", "queries"): (1,),
    ("match_argmax", "keys"): (1,),
    ("gather_norm", "tokens"): (1,),
    ("gather_norm", "match"): (1,),
    ("gather_norm_mix", "tokens"): (1,),
    ("gather_norm_mix", "mixing"): (0,),
    ("channel_moments", "x"): (0, 2, 3),
    ("batch_norm_relu", "x"): (0, 2, 3),
    ("upsample_conv2d", "x"): (0, 2, 3),
    ("upsample_conv2d", "weight"): (0,),
    ("upsample_conv2d_moments", "x"): (0, 2, 3),
    ("upsample_cross_entropy", "logits"): (1, 2, 3),
    ("upsample_cross_entropy_argmax", "logits"): (1, 2, 3),
    ("upsample_argmax", "logits"): (0, 1, 2, 3),
    ("upsample_argmax_probability", "logits"): (0, 1, 2, 3),
}
# Functions whose floating-point arguments may differ in dtype: each is read as it is.
MIXED = (
    "masked_patch_loss",
    "upsampled_l1_loss",
    "band_reconstruction_loss",
    "gather_tokens",  # of its two tensors one is an index
    "restore_tokens",
    "upsample_cross_entropy",
    "upsample_cross_entropy_argmax",
    "channel_moments",
    "batch_norm_relu",
)


def free_dimensions(function: str, name: str, value: Tensor) -> Sequence[int]:
    free = FREE.get((function, name), ())
    return range(value.dim() - 1) if free == "leading" else tuple(int(place) for place in free)


def changes(function: str, draw: Draw, flat: Named) -> Iterator[tuple[str, str, Any]]:
    """All (argument, change, new value) of a call that its function must refuse."""
    tensors = [value for value in flat.values() if isinstance(value, Tensor | nn.Module)]
    for name, value in flat.items():
        if name in OPTIONS and value is not None and not isinstance(value, Tensor):
            yield name, "option", draw.choice(OPTIONS[name])
        if not isinstance(value, Tensor):
            continue
        free = free_dimensions(function, name, value)
        floating = value.is_floating_point()
        wrong = [torch.complex64, torch.int8 if floating else torch.float32]
        yield name, "dtype", value.to(wrong[0] if name == "mask" else draw.choice(wrong))
        if floating and len(tensors) > 1 and function not in MIXED:
            yield name, "other float", value.to(torch.bfloat16)
        if len(tensors) > 1:
            yield name, "device", value.to("meta")
        if FREE.get((function, name)) != "leading":
            yield name, "dimension", value.unsqueeze(draw.random.randint(0, value.dim()))
        fixed = [place for place in range(value.dim()) if place not in free]
        if fixed:
            place = draw.choice(fixed)
            shape = list(value.shape)
            shape[place] = 1
            more = value.narrow(place, 0, 1) if value.shape[place] else value.new_zeros(shape)
            yield name, "size", torch.cat([value, more], place)
        if name in INDICES and not floating and value.numel():
            index = value.clone(memory_format=torch.contiguous_format)
            at = draw.random.randrange(index.numel())
            index.view(-1)[at] = draw.choice([-1 if index.dtype.is_signed else 250, 100])
            yield name, "index", index


def snapshot(flat: Named) -> list[Any]:
    """Bytes of everything that a refused call must leave alone."""
    found: list[Any] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    found.append(np.random.get_state()[1].tobytes())  # type: ignore[index] # noqa: NPY002
    for value in flat.values():
        held = (
            [value]
            if isinstance(value, Tensor)
            else list(value.state_dict().values())
            if isinstance(value, nn.Module)
            else []
        )
        for tensor in held:
            if tensor.device.type != "meta":
                storage = tensor.detach().untyped_storage()
                found.append(bytes(storage))  # type: ignore[arg-type]
                found.append((tensor.shape, tensor.stride()))
    return found


def failure_of(number: int) -> str | None:
    """What is wrong with how a sample's call is refused."""
    entry = ENTRIES[number % len(ENTRIES)]
    public = PUBLIC[entry.name]
    draw = Draw(number)
    dtype = draw.choice([torch.float32, torch.float64])
    args = entry.draw(draw)
    args = arrange(args, draw.layouts(args), dtype, grad=entry.differentiable)
    flat = public.arguments(dict(zip(entry.names, entry.complete(args), strict=True)))
    if "ignore_index" in flat:
        flat["ignore_index"] = -100  # every label counts
    possible = list(changes(entry.name, draw, flat))
    name, change, value = possible[(number // len(ENTRIES)) % len(possible)]
    given = {**flat, name: value}
    backend = draw.choice([None, "eager"])
    where = f"sample {number}: {entry.name}, {name}: {change}, backend {backend}"
    before = snapshot(given)
    try:
        public.call(backend, **given)
    except (TypeError, ValueError, IndexError) as error:
        text = str(error)
        if "\n" in text:
            return f"{where}: more than one line: {text[:200]!r}"
        # What disagrees with another argument may be told of that one.
        names = [name] if change in ("dtype", "option", "index") else list(given)
        if not any(text.startswith(each) or f" of {each}" in text for each in names):
            return f"{where}: the error does not name it: {text[:200]!r}"
    except Exception as error:
        return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        return f"{where}: accepted"
    return None if snapshot(given) == before else f"{where}: something was written"


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome()
    for number in numbers:
        failure = failure_of(number)
        outcome.failures += [failure] if failure else []
        outcome.checked += 1
    return outcome
