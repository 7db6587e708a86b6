// One pass over the pixels of upsampled logits, for the operators of loss and prediction.
#pragma once

#include <ATen/ATen.h>

#include "cpu/upsample/columns.h"
#include "cpu/upsample/labels.h"

namespace spectralx::cpu {

// What a pass reads and what it leaves; undefined tensors are not wanted. T is the accumulation type
// of the logits; tensors called wide have it, and are contiguous.
struct PredictionPass {
  at::Tensor logits;  // [B, K, h, w], any floating type and strides
  Axis rows, columns;

  // The loss; without a target there is none.
  at::Tensor target;  // [B, H, W], any integer type and strides
  at::Tensor weight;  // [K], wide
  int64_t ignore_index = -100;
  double label_smoothing = 0;

  // Gradients are those of the sum of `upstream` [B, H, W], wide, times the pixels' losses (without a
  // target: times the probabilities of the best classes); undefined: of ones.
  at::Tensor upstream;

  at::Tensor losses;       // [B, H, W], wide
  at::Tensor label;        // [B, H, W], int64: the best class
  at::Tensor probability;  // [B, H, W], wide
  at::Tensor confusion;    // [K, K], int64, added to
  at::Tensor gradient;     // [B, K, h, w], wide
  at::Tensor class_sums;   // [3, K], wide: the gradient of `weight` by the labels, by the smoothing;
                           // and how many pixels have the class
  double loss_sum = 0, weight_sum = 0;
  WrongValues wrong;  // their pixels count as ignored

  PredictionPass(const at::Tensor& logits, at::IntArrayRef size, bool align_corners);
  void run();

 private:
  template <typename T>
  void run_as();
};

}  // namespace spectralx::cpu
