"""Fused operators and drop-in modules of SpectralX for PyTorch."""

from spectralx_kernels._backends import show_backends, use_backend
from spectralx_kernels._official_names import (
    OfficialNames,
    OfficialTensor,
    official_inert,
    official_parameters,
    official_state_dict,
)
from spectralx_kernels.aomoa import (
    AoMoALinear,
    RoutingStatistics,
    aomoa,
    balance_loss,
    noisy_topk_gating,
)
from spectralx_kernels.hypert import (
    HyperT,
    SpatialSpectralTokenizer,
    attribute_match,
    residual_halving,
    window_attention,
)
from spectralx_kernels.reconstruction import (
    band_reconstruction_loss,
    band_targets,
    gather_tokens,
    masked_patch_loss,
    patchify,
    random_masking,
    restore_tokens,
    unpatchify,
    upsampled_l1_loss,
)
from spectralx_kernels.refine import (
    AreAdapter,
    add_weighted_halves,
    gather_norm,
    gather_norm_mix,
    match_argmax,
)
from spectralx_kernels.upsample import (
    UpsampleConv2d,
    UpsampleCrossEntropyLoss,
    batch_norm_relu,
    check_labels,
    concat_conv2d,
    confusion_matrix_update,
    fold_batch_norm,
    upsample_argmax,
    upsample_conv2d,
    upsample_cross_entropy,
    upsample_cross_entropy_argmax,
)

__version__ = "0.1.0"

__all__ = [
    "AoMoALinear",
    "AreAdapter",
    "HyperT",
    "OfficialNames",
    "OfficialTensor",
    "RoutingStatistics",
    "SpatialSpectralTokenizer",
    "UpsampleConv2d",
    "UpsampleCrossEntropyLoss",
    "add_weighted_halves",
    "aomoa",
    "attribute_match",
    "balance_loss",
    "band_reconstruction_loss",
    "band_targets",
    "batch_norm_relu",
    "check_labels",
    "concat_conv2d",
    "confusion_matrix_update",
    "fold_batch_norm",
    "gather_norm",
    "gather_norm_mix",
    "gather_tokens",
    "masked_patch_loss",
    "match_argmax",
    "noisy_topk_gating",
    "official_inert",
    "official_parameters",
    "official_state_dict",
    "patchify",
    "random_masking",
    "residual_halving",
    "restore_tokens",
    "show_backends",
    "unpatchify",
    "upsample_argmax",
    "upsample_conv2d",
    "upsample_cross_entropy",
    "upsample_cross_entropy_argmax",
    "upsampled_l1_loss",
    "use_backend",
    "window_attention",
]
