// Norms, and sums along features or lanes.
// A part of panels_impl.h.
#pragma once

namespace {

// Sums over features are taken in blocks, which keeps their round-off near that of a tree.
constexpr int64_t kSumBlock = 32;

template <typename Op>
void moments(const Op* panel, int64_t features, Wide<Op> eps, Wide<Op>* mean, Wide<Op>* rstd) {
  using W = Wide<Op>;
  W total[kPanel] = {}, part[kPanel] = {};
  const auto fold = [&](int64_t f) {
    if (f % kSumBlock != kSumBlock - 1 && f != features - 1) return;
    SPECTRALX_LANES total[n] += part[n];
    SPECTRALX_LANES part[n] = W(0);
  };
  for_features<Op>(panel, features, [&](int64_t f, const W* row) {
    SPECTRALX_LANES part[n] += row[n];
    fold(f);
  });
  SPECTRALX_LANES mean[n] = total[n] / static_cast<W>(features);
  SPECTRALX_LANES total[n] = W(0);
  for_features<Op>(panel, features, [&](int64_t f, const W* row) {
    SPECTRALX_LANES part[n] += (row[n] - mean[n]) * (row[n] - mean[n]);
    fold(f);
  });
  SPECTRALX_LANES rstd[n] = W(1) / std::sqrt(total[n] / static_cast<W>(features) + eps);
}

template <typename Op>
void normalise(const Op* panel, int64_t features, const Wide<Op>* mean, const Wide<Op>* rstd,
               const Wide<Op>* weight, const Wide<Op>* bias, Op* out) {
  using W = Wide<Op>;
  W before[kPanel];
  for_features<Op>(panel, features, [&](int64_t f, const W* row) {
    const W scale = weight[f], shift = bias[f];
    if constexpr (sizeof(Op) == 2) {
      W value[kPanel];
      SPECTRALX_LANES value[n] = (row[n] - mean[n]) * rstd[n] * scale + shift;
      if (f % 2 == 0) {
        SPECTRALX_LANES before[n] = value[n];
      } else {
        store_pair<Op>(before, value, out, f - 1);
      }
    } else {
      W* to = out + f * kPanel;
      SPECTRALX_LANES to[n] = (row[n] - mean[n]) * rstd[n] * scale + shift;
    }
  });
}

template <typename Op>
void norm(Wide<Op>* x, int64_t features, Wide<Op> eps, Wide<Op>* rstd) {
  using W = Wide<Op>;
  W mean[kPanel];
  if constexpr (std::is_same_v<Op, W>) {
    moments<Op>(x, features, eps, mean, rstd);
  } else {
    moments<W>(x, features, eps, mean, rstd);
  }
  for (int64_t f = 0; f < features; ++f) {
    W* row = x + f * kPanel;
    SPECTRALX_LANES row[n] = (row[n] - mean[n]) * rstd[n];
  }
}

template <typename Op>
void affine(const Wide<Op>* normed, int64_t features, const Wide<Op>* weight,
            const Wide<Op>* bias, Wide<Op>* z) {
  using W = Wide<Op>;
  for (int64_t f = 0; f < features; ++f) {
    const W* row = normed + f * kPanel;
    W* to = z + f * kPanel;
    const W scale = weight[f], shift = bias[f];
    SPECTRALX_LANES to[n] = value_of(rounded<Op>(row[n] * scale + shift));
  }
}

// A fixed tree, the same on every instruction set.
template <typename W>
inline W sum_of_lanes(const W* lanes) {
  W part[kPanel / 2];
  for (int64_t n = 0; n < kPanel / 2; ++n) part[n] = lanes[n] + lanes[n + kPanel / 2];
  for (int64_t width = kPanel / 4; width > 0; width /= 2) {
    for (int64_t n = 0; n < width; ++n) part[n] += part[n + width];
  }
  return part[0];
}

template <typename Op>
void norm_backward(Wide<Op>* dz, const Wide<Op>* normed, int64_t features, const Wide<Op>* rstd,
                   const Wide<Op>* weight, Wide<Op>* dweight, Wide<Op>* dbias) {
  using W = Wide<Op>;
  W sum[kPanel] = {}, along[kPanel] = {};
  for (int64_t f = 0; f < features; ++f) {
    W* g = dz + f * kPanel;
    const W* x = normed + f * kPanel;
    const W scale = weight[f];
    W product[kPanel];
    SPECTRALX_LANES product[n] = g[n] * x[n];
    dweight[f] += sum_of_lanes(product);
    dbias[f] += sum_of_lanes(g);
    SPECTRALX_LANES g[n] *= scale;
    SPECTRALX_LANES sum[n] += g[n];
    SPECTRALX_LANES along[n] += product[n] * scale;
  }
  SPECTRALX_LANES sum[n] /= static_cast<W>(features);
  SPECTRALX_LANES along[n] /= static_cast<W>(features);
  for (int64_t f = 0; f < features; ++f) {
    W* g = dz + f * kPanel;
    const W* x = normed + f * kPanel;
    SPECTRALX_LANES g[n] = rstd[n] * (g[n] - sum[n] - x[n] * along[n]);
  }
}

template <typename Op>
void add_sums(const Wide<Op>* panel, int64_t features, Wide<Op>* sums) {
  for (int64_t f = 0; f < features; ++f) sums[f] += sum_of_lanes(panel + f * kPanel);
}

template <typename Op>
void scale_features(Wide<Op>* panel, int64_t features, const Wide<Op>* weight) {
  for (int64_t f = 0; f < features; ++f) {
    Wide<Op>* row = panel + f * kPanel;
    const Wide<Op> scale = weight[f];
    SPECTRALX_LANES row[n] *= scale;
  }
}

template <typename Op>
void scale_tokens(const Wide<Op>* panel, int64_t features, const Wide<Op>* weight,
                  Wide<Op>* out) {
  for (int64_t f = 0; f < features; ++f) {
    SPECTRALX_LANES out[f * kPanel + n] = panel[f * kPanel + n] * weight[n];
  }
}

template <typename Op>
void dot_weight(const Wide<Op>* panel, int64_t features, const Wide<Op>* weight,
                Wide<Op>* sums) {
  using W = Wide<Op>;
  SPECTRALX_LANES sums[n] = W(0);
  for (int64_t f = 0; f < features; ++f) {
    const W scale = weight[f];
    SPECTRALX_LANES sums[n] += panel[f * kPanel + n] * scale;
  }
}

template <typename Op>
void dot_panel(const Wide<Op>* panel, int64_t features, const Wide<Op>* other, Wide<Op>* sums) {
  using W = Wide<Op>;
  SPECTRALX_LANES sums[n] = W(0);
  for (int64_t f = 0; f < features; ++f) {
    SPECTRALX_LANES sums[n] += panel[f * kPanel + n] * other[f * kPanel + n];
  }
}

}  // namespace
