// Channels-last maps: what the files of this room share. Maths: spectralx_kernels/upsample/README.md.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "common/laid_out.h"
#include "cpu/upsample/lines.h"

// The body with S, what tensors of this type hold, and A, what sums of them are formed in.
#define SPECTRALX_DISPATCH(type, ...)  \
  if ((type) == at::kDouble) {         \
    using S = double;                  \
    using A = double;                  \
    __VA_ARGS__();                     \
  } else if ((type) == at::kBFloat16) { \
    using S = c10::BFloat16;           \
    using A = float;                   \
    __VA_ARGS__();                     \
  } else {                             \
    using S = float;                   \
    using A = float;                   \
    __VA_ARGS__();                     \
  }

namespace spectralx::cpu {

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

template <typename T>
T* data(const at::Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

inline at::ScalarType sum_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Channels last where x is that and nothing else.
inline at::MemoryFormat format_of(const at::Tensor& x) {
  return x.is_contiguous(kChannelsLast) && !x.is_contiguous() ? kChannelsLast
                                                              : at::MemoryFormat::Contiguous;
}

// A map in the other layout: [B, C, H, W] to channels last, or back where `planes`.
template <typename S, typename A>
at::Tensor relaid(const at::Tensor& map, bool planes) {
  const int64_t channels = map.size(1), rows = map.size(2), columns = map.size(3);
  at::Tensor to = at::empty(map.sizes(), map.options(),
                            planes ? at::MemoryFormat::Contiguous : kChannelsLast);
  const int64_t area = rows * columns, lines = map.size(0) * rows;
  at::parallel_for(0, lines, 4, [&](int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      const int64_t image = line / rows * channels * area, place = line % rows * columns;
      const int64_t pixel = image + place * channels, plane = image + place;
      const S* from = map.const_data_ptr<S>();
      if (planes) {
        line_kernels<S, A>().transpose(from + pixel, columns, channels, channels, area,
                                       data<S>(to) + plane);
      } else {
        line_kernels<S, A>().transpose(from + plane, channels, columns, area, channels,
                                       data<S>(to) + pixel);
      }
    }
  });
  return to;
}

// `map` in channels-last memory.
template <typename S, typename A>
at::Tensor channels_last(const at::Tensor& map) {
  return map.is_contiguous(kChannelsLast) ? map : relaid<S, A>(map.contiguous(), false);
}

// Mean and biased variance [2, C] from those of parts, [parts, 2, C] of mean and squared deviations
// from it, `each` values a channel but for the last part, which has what is left of `count`; merged
// in order, in double.
at::Tensor merged_moments(const at::Tensor& parts, int64_t each, int64_t count);

}  // namespace spectralx::cpu
