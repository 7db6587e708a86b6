// Moments of a map's channels: memory around norm.cu, for what forms them in its own pass too.
#pragma once
#include "cuda/common/glue.h"
#include "cuda/common/norm.h"

namespace spectralx::cuda {

inline int64_t pixels_of(const Tensor& map) { return map.size(0) * map.size(2) * map.size(3); }

// Memory of `count` parts, with the scratch that joining them takes.
struct Parts {
  int64_t count;
  Tensor values, counts;

  Parts(const Tensor& map, int64_t parts, int64_t channels) : count(parts) {
    const auto options = map.options().dtype(wide_type(map));
    const int64_t all = count + spectralx_moment_groups(count);
    values = at::empty({all, 2, channels}, options);
    counts = at::empty({all}, options);
  }

  // Mean and biased variance, [2, channels].
  Tensor joined(const char* name, int64_t type) const {
    const Tensor moments = at::empty({2, values.size(2)}, values.options());
    check_launch(name, spectralx_join_moments(type, pointer(values), pointer(counts), count,
                                              values.size(2), pointer(moments), current_stream()));
    return moments;
  }
};

// Mean and biased variance of a channels-last map, into the first two rows of `moments` [.., channels].
inline void moments_into(const char* name, const Tensor& x, const Tensor& moments) {
  const int64_t rows = pixels_of(x), channels = x.size(1);
  const Parts parts(x, spectralx_moment_parts(rows), channels);
  check_launch(name, spectralx_channel_moments(type_code(x), pointer(x), rows, channels,
                                               pointer(parts.values), pointer(parts.counts),
                                               pointer(moments), current_stream()));
}

inline Tensor moments_of(const char* name, const Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 4, "x: got ", map.dim(), " dimensions, expected 4");
  const Tensor moments = at::empty({2, map.size(1)}, map.options().dtype(wide_type(map)));
  moments_into(name, map.contiguous(at::MemoryFormat::ChannelsLast), moments);
  return moments;
}

}  // namespace spectralx::cuda
