"""Convolution, cross-entropy and prediction of a bilinearly upsampled map."""

from spectralx_kernels.upsample.confusion import check_labels, confusion_matrix_update
from spectralx_kernels.upsample.convolution import concat_conv2d, upsample_conv2d
from spectralx_kernels.upsample.modules import UpsampleConv2d, UpsampleCrossEntropyLoss
from spectralx_kernels.upsample.norm import batch_norm_relu, fold_batch_norm
from spectralx_kernels.upsample.prediction import (
    upsample_argmax,
    upsample_cross_entropy,
    upsample_cross_entropy_argmax,
)

__all__ = [
    "UpsampleConv2d",
    "UpsampleCrossEntropyLoss",
    "batch_norm_relu",
    "check_labels",
    "concat_conv2d",
    "confusion_matrix_update",
    "fold_batch_norm",
    "upsample_argmax",
    "upsample_conv2d",
    "upsample_cross_entropy",
    "upsample_cross_entropy_argmax",
]
