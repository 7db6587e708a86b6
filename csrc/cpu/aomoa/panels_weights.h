// What rows and columns of weights take part in: the folded norm, and the ends of their gradients.
// A part of panels_impl.h.
#pragma once

namespace {

template <typename Op>
void fold(const Op* row, int64_t width, const Wide<Op>* gamma, const Wide<Op>* beta, Wide<Op>* sum,
          Wide<Op>* shift) {
  using W = Wide<Op>;
  constexpr int64_t kLanes = 16;  // sums are joined at the end of the row
  const auto* from = elements(row);
  fetch(row + width, width);  // the next row: often a page of its own, where no stream goes on
  W total[kLanes] = {}, moved[kLanes] = {};
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t end = std::min(start + kBlock, width);
    W products[kBlock];
    Op folded[kBlock];
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
      for (int64_t n = 0; n < kLanes; ++n) {
        const W weight = value_of(from[i + n]);
        products[i - start + n] = gamma[i + n] * weight;
        moved[n] += beta[i + n] * weight;
      }
    }
    for (; i < end; ++i) {
      const W weight = value_of(from[i]);
      products[i - start] = gamma[i] * weight;
      moved[(i - start) % kLanes] += beta[i] * weight;
    }
    round_row<Op>(products, end - start, folded);
    const auto* to = elements(folded) - start;
    // Of what the product will use.
    for (i = start; i + kLanes <= end; i += kLanes) {
#pragma omp simd
      for (int64_t n = 0; n < kLanes; ++n) total[n] += value_of(to[i + n]);
    }
    for (; i < end; ++i) total[(i - start) % kLanes] += value_of(to[i]);
  }
  *sum = sum_of<kLanes>(total);
  *shift = sum_of<kLanes>(moved);
}

template <typename Op>
void finish_down(const Op* down, const Wide<Op>* products, int64_t r, int64_t columns,
                 int64_t stride, const Wide<Op>* gamma, const Wide<Op>* beta,
                 const Wide<Op>* z0_sums, Op* down_grad, Wide<Op>* gamma_grad,
                 Wide<Op>* beta_grad) {
  using W = Wide<Op>;
  std::fill(gamma_grad, gamma_grad + columns, W(0));
  std::fill(beta_grad, beta_grad + columns, W(0));
  for (int64_t j = 0; j < r; ++j) {
    fetch(down + std::min(j + kFetched, r - 1) * stride, columns);
    fetch_to_write(down_grad + std::min(j + kFetched, r - 1) * stride, columns);
    const auto* weight = elements(down + j * stride);
    const W* product = products + j * kBlock;
    const W sum = z0_sums[j];
    W grad[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const W w = value_of(weight[i]);
      gamma_grad[i] += w * product[i];
      beta_grad[i] += w * sum;
      grad[i] = product[i] * gamma[i] + sum * beta[i];
    }
    round_row<Op>(grad, columns, down_grad + j * stride);
  }
}

template <typename Op>
void add_columns(const Wide<Op>* products, int64_t r, int64_t count, const Wide<Op>* weight, const Op* up,
                 bool add, Wide<Op>* panel, Wide<Op>* along) {
  using W = Wide<Op>;
  W scale[kPanel] = {}, total[kPanel] = {};
  std::copy_n(weight, count, scale);
  if (!add) std::fill_n(panel, r * kPanel, W(0));
  for_features<Op>(up, r, [&](int64_t i, const W* row) {
    const W* from = products + i * kBlock;
    W* to = panel + i * kPanel;
    if (count == kPanel) {
      SPECTRALX_LANES {
        total[n] += from[n] * row[n];
        to[n] += scale[n] * from[n];
      }
      return;
    }
    for (int64_t n = 0; n < count; ++n) {  // what lies beyond is anything
      total[n] += from[n] * row[n];
      to[n] += scale[n] * from[n];
    }
  });
  std::copy_n(total, count, along);
}

template <typename Op>
void finish_input(const Wide<Op>* product, int64_t tokens, int64_t columns, const Op* x,
                  const Wide<Op>* mean, const Wide<Op>* offset, const Wide<Op>* slope, Op* dx,
                  int64_t stride) {
  using W = Wide<Op>;
  for (int64_t t = 0; t < tokens; ++t) {
    fetch(x + std::min(t + kFetched, tokens - 1) * stride, columns);
    fetch_to_write(dx + std::min(t + kFetched, tokens - 1) * stride, columns);
    const W* from = product + t * kBlock;
    const W m = mean[t], o = offset[t], s = slope[t];
    const auto* in = elements(x + t * stride);
    W grad[kBlock];
#pragma omp simd
    for (int64_t n = 0; n < columns; ++n) grad[n] = from[n] - o - (value_of(in[n]) - m) * s;
    round_row<Op>(grad, columns, dx + t * stride);
  }
}

}  // namespace
