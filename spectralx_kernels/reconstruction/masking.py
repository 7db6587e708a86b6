"""Which tokens an encoder sees: operators that choose them, take them out and put them back."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralx_kernels._checks import (
    check_device,
    check_floating,
    check_range,
    check_shape,
    looks_itself,
    values_are_free,
)
from spectralx_kernels._operator import Operator, prefer_triton
from spectralx_kernels.reconstruction import reference

# Noise is compared: in float32 under autocast.
RANDOM_MASKING = Operator(
    "random_masking",
    "(Tensor noise, int keep) -> (Tensor ids_keep, Tensor mask, Tensor ids_restore)",
    reference.random_masking,
    differentiable=False,
    autocast_to=torch.float32,
    prefer=prefer_triton,
)
GATHER_TOKENS = Operator(
    "gather_tokens",
    "(Tensor tokens, Tensor ids) -> Tensor",
    reference.gather_tokens,
    prefer=prefer_triton,
)
RESTORE_TOKENS = Operator(
    "restore_tokens",
    "(Tensor tokens, Tensor ids_restore, Tensor mask_token) -> Tensor",
    reference.restore_tokens,
    prefer=prefer_triton,
)
for _operator in (RANDOM_MASKING, GATHER_TOKENS, RESTORE_TOKENS):
    _operator.add_triton("spectralx_kernels.reconstruction.triton_masking")


def _as_they_are(operator: Operator, *args: Tensor, backend: str | None) -> Tensor:
    """Tokens that are only moved are not cast under autocast."""
    device = args[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        moved: Tensor = operator(*args, backend=backend)
        return moved
    with torch.autocast(device, enabled=False):
        moved = operator(*args, backend=backend)
    return moved


def check_indices(name: str, ids: Tensor) -> None:
    """`ids` is int64, as torch.gather wants it."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {ids.dtype}, expected torch.int64")


def check_values(
    name: str, ids: Tensor, tokens: int, operator: Operator, backend: str | None
) -> None:
    """`ids` are 0 to `tokens` - 1, where looking costs nothing and no kernel looks itself."""
    if ids.numel() == 0 or not values_are_free(ids) or looks_itself(operator.name, backend):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= tokens:
        wrong = low if low < 0 else high
        raise IndexError(f"{name}: got {wrong}, expected 0 to {tokens - 1}")


def random_masking(
    noise: Tensor, keep: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the tokens an encoder sees: those with the smallest noise.

    Parameters
    ----------
    noise : [B, L], uniform draws; a floating-point dtype. Equal values go to the lowest index.
        NaN sorts last.
    keep : tokens to keep of each sample, 0 to L; ``int(L * (1 - ratio))``.
    backend : overrides the default backend.

    Returns
    -------
    ids_keep : [B, keep], int64, the kept tokens in ascending order of noise.
    mask : [B, L] in the dtype of `noise`; 0 kept, 1 masked. No gradient.
    ids_restore : [B, L], int64; token i is number ids_restore[i] in order of noise.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, shape or range.

    Source: masked autoencoders (He et al. 2022, arXiv 2111.06377), as SpectralX's stage 1 uses it.
    """
    check_floating("noise", noise)
    check_shape("noise", noise, ("batch", "tokens"))
    check_range("keep", keep, 0, noise.shape[1])
    ids_keep, mask, ids_restore = RANDOM_MASKING(noise, keep, backend=backend)
    return ids_keep, mask.to(noise.dtype), ids_restore


def gather_tokens(tokens: Tensor, ids: Tensor, *, backend: str | None = None) -> Tensor:
    """The tokens at `ids`, in that order; the gradient goes back to where they came from.

    Parameters
    ----------
    tokens : [B, L, D].
    ids : [B, K], int64 in [0, L); `ids_keep` of `random_masking`.
    backend : overrides the default backend.

    Returns
    -------
    [B, K, D].

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.
    IndexError : an index outside, of CPU tensors (with backend "eager" outside torch.compile only).
    """
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, ("batch", "tokens", "width"))
    check_shape("ids", ids, (tokens.shape[0], "kept"))
    check_indices("ids", ids)
    check_device("ids", ids, "tokens", tokens)
    check_values("ids", ids, tokens.shape[1], GATHER_TOKENS, backend)
    return _as_they_are(GATHER_TOKENS, tokens, ids, backend=backend)


def restore_tokens(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, *, backend: str | None = None
) -> Tensor:
    """Put kept tokens back in their places and the mask token in all others.

    Parameters
    ----------
    tokens : [B, K, D], the kept tokens in the order of `ids_keep`.
    ids_restore : [B, L], int64, from `random_masking`; L >= K.
    mask_token : [D] or [1, 1, D].
    backend : overrides the default backend.

    Returns
    -------
    [B, L, D] in the dtype of `tokens`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.
    IndexError : an index outside, of CPU tensors (with backend "eager" outside torch.compile only).
    """
    check_floating("tokens", tokens)
    check_floating("mask_token", mask_token)
    check_shape("tokens", tokens, ("batch", "kept", "width"))
    check_shape("ids_restore", ids_restore, (tokens.shape[0], "tokens"))
    check_indices("ids_restore", ids_restore)
    if tokens.shape[1] > ids_restore.shape[1]:
        raise ValueError(
            f"tokens: got {tokens.shape[1]} of them, expected at most the "
            f"{ids_restore.shape[1]} of ids_restore"
        )
    if mask_token.dim() == 3:
        check_shape("mask_token", mask_token, (1, 1, tokens.shape[2]))
    else:
        check_shape("mask_token", mask_token, (tokens.shape[2],))
    check_device("ids_restore", ids_restore, "tokens", tokens)
    check_device("mask_token", mask_token, "tokens", tokens)
    check_values("ids_restore", ids_restore, ids_restore.shape[1], RESTORE_TOKENS, backend)
    return _as_they_are(RESTORE_TOKENS, tokens, ids_restore, mask_token, backend=backend)
