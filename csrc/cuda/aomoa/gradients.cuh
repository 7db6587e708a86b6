// The weights' gradients: a block takes 64 columns of the rank, one group (an expert, an attribute's
// router, or the sums of the norms) and one part of the rows; its sums go to the part's place, and
// `finish` adds the parts up in their order. Products run over the rows of the group only.
#pragma once
#include "cuda/aomoa/mixture.cuh"

namespace spectralx::cuda {

// Offsets into one part's sums: fc2 [E, r, h], fc1 [E, h, r], fc2_bias [E, r], fc1_bias [E, h],
// router [A, 2 E, r], norms [4, r].
struct PartLayout {
  int64_t fc1, fc2_bias, fc1_bias, router, norms, size;

  __host__ __device__ PartLayout(int attributes, int rank, int hidden, int experts) {
    const int64_t matrix = int64_t(experts) * rank * hidden;
    fc1 = matrix;
    fc2_bias = 2 * matrix;
    fc1_bias = fc2_bias + int64_t(experts) * rank;
    router = fc1_bias + int64_t(experts) * hidden;
    norms = router + int64_t(attributes) * 2 * experts * rank;
    size = norms + int64_t(4) * rank;
  }
};

template <typename S>
struct GradientTensors {
  const Wide<S>* normed;
  const S *gamma, *beta;
  const S *hidden_rows, *hidden_grad, *output_grad, *router_grad;
  const short* slots;
  const Wide<S>* norm_partial;  // [row_blocks, 4, r]
  int row_blocks;
  Wide<S>* parts;
};

constexpr int kGradientRows = 64;  // looked at together

template <typename S>
__host__ __device__ constexpr int gradient_shared() {
  return 4 * kChunk * operand_stride<S>(kGradientRows) * static_cast<int>(sizeof(S)) +
         static_cast<int>(sizeof(int)) * (2 * kGradientRows + 4);
}

// The rows from `first` on that take part in a group, with their slots; in order.
template <typename S>
struct Members {
  int *rows, *places, *counts;

  // Row r (of R) takes part where slot_of(r) >= 0. A barrier before and after.
  template <typename SlotOf>
  __device__ int find(int64_t first, int64_t end, SlotOf slot_of) const {
    __syncthreads();
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int slot = -1;
    unsigned votes = 0;
    if (warp < kGradientRows / 32) {
      const int64_t row = first + tid;
      if (row < end) slot = slot_of(row);
      votes = __ballot_sync(0xffffffffu, slot >= 0);
      if (lane == 0) counts[warp] = __popc(votes);
    }
    __syncthreads();
    if (slot >= 0) {
      const int at = (warp == 0 ? 0 : counts[0]) + __popc(votes & ((1u << lane) - 1));
      rows[at] = tid;
      places[at] = slot;
    }
    __syncthreads();
    return counts[0] + counts[1];
  }
};

// target[n * stride + k] = value(k, n) for n < columns, k < depth; zeros up to kChunk and 16.
template <typename S, typename Value>
__device__ void stage_gathered(S* target, int columns, int depth, Value value) {
  const int stride = operand_stride<S>(kGradientRows);
  for (int i = threadIdx.x; i < kChunk * static_cast<int>(round_up(depth, 16)); i += kThreads) {
    const int n = i % kChunk, k = i / kChunk;
    target[n * stride + k] = n < columns && k < depth ? value(k, n) : narrow<S>(0);
  }
}

template <typename S>
__device__ Wide<S> row_sum(const S* row, int depth) {
  Wide<S> sum = 0;
  for (int k = 0; k < depth; ++k) sum += wide(row[k]);
  return sum;
}

// Grid (chunks of the rank, E + A + 1, splits).
template <typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    weight_gradients(MixtureSizes s, GradientTensors<S> t) {
  using W = Wide<S>;
  const PartLayout layout(s.attributes, s.rank, s.hidden, s.experts);
  W* part = t.parts + int64_t(blockIdx.z) * layout.size;
  const int c0 = blockIdx.x * kChunk, columns = min(kChunk, s.rank - c0);
  const int group = blockIdx.y, tid = threadIdx.x;

  if (group == s.experts + s.attributes) {
    const int plane = tid / kChunk, column = c0 + tid % kChunk;
    if (column >= s.rank) return;
    const int per = static_cast<int>(ceil_div(t.row_blocks, gridDim.z)), begin = blockIdx.z * per;
    W sum = 0;
    for (int block = begin; block < min(begin + per, t.row_blocks); ++block)
      sum += t.norm_partial[(int64_t(block) * 4 + plane) * s.rank + column];
    part[layout.norms + int64_t(plane) * s.rank + column] = sum;
    return;
  }

  const int stride = operand_stride<S>(kGradientRows), operand = kChunk * stride;
  S* z = reinterpret_cast<S*>(dynamic_shared());
  S *inner_grad = z + operand, *output_grad = inner_grad + operand, *hidden = output_grad + operand;
  int* rows = reinterpret_cast<int*>(hidden + operand);
  const Members<S> members{rows, rows + kGradientRows, rows + 2 * kGradientRows};

  const bool expert = group < s.experts;
  const int attribute = group - s.experts, per_row = s.dense ? s.experts : s.top_k;
  const int inner = expert ? s.hidden : 2 * s.experts;  // rows of this group's first product
  const S* inner_source = expert ? t.hidden_grad : t.router_grad;
  const auto slot_of = [&](int64_t row) {
    if (!expert) return row % s.attributes == attribute ? 0 : -1;
    for (int slot = 0; slot < per_row; ++slot)
      if (t.slots[row * per_row + slot] == group) return slot;
    return -1;
  };
  const int64_t per = round_up(ceil_div(s.rows(), gridDim.z), kGradientRows);
  const int64_t begin = blockIdx.z * per, end = min(begin + per, s.rows());

  for (int n0 = 0; n0 < inner; n0 += kChunk) {
    const int wanted = min(kChunk, inner - n0);
    const Share inner_share(static_cast<int>(ceil_div(wanted, 16)),
                            static_cast<int>(ceil_div(columns, 8)));
    const Share output_share(static_cast<int>(ceil_div(columns, 16)),
                             static_cast<int>(ceil_div(wanted, 8)));
    Tiles<W> inner_tiles, output_tiles;
    W bias = 0;
    for (int64_t first = begin; first < end; first += kGradientRows) {
      const int depth = members.find(first, end, slot_of);
      if (depth == 0) continue;
      // Of [R, K] (of [R] for a router).
      const auto entry = [&](int k) {
        const int64_t row = first + members.rows[k];
        return expert ? row * per_row + members.places[k] : row;
      };
      stage_gathered<S>(z, columns, depth, [&](int k, int n) {
        const int64_t at = (first + members.rows[k]) * s.rank + c0 + n;
        return narrow<S>(t.normed[at] * wide(t.gamma[c0 + n]) + wide(t.beta[c0 + n]));
      });
      stage_gathered<S>(inner_grad, wanted, depth, [&](int k, int n) {
        return inner_source[entry(k) * inner + n0 + n];
      });
      if (expert) {
        stage_gathered<S>(output_grad, columns, depth, [&](int k, int n) {
          return t.output_grad[entry(k) * s.rank + c0 + n];
        });
        stage_gathered<S>(hidden, wanted, depth, [&](int k, int n) {
          return t.hidden_rows[entry(k) * s.hidden + n0 + n];
        });
      }
      __syncthreads();
      const int g = tid % 32 / 4;
      const S* low = inner_grad + (inner_share.row * 16 + g) * stride;
      multiply<S>(inner_tiles, low, low + 8 * stride, z, stride, inner_share, depth);
      if (!expert) continue;
      low = output_grad + (output_share.row * 16 + g) * stride;
      multiply<S>(output_tiles, low, low + 8 * stride, hidden, stride, output_share, depth);
      if (tid < kChunk) {
        bias += row_sum(output_grad + tid * stride, depth);
      } else if (tid < 2 * kChunk) {
        bias += row_sum(inner_grad + (tid - kChunk) * stride, depth);
      }
    }
    W* target = expert ? part + layout.fc1 + int64_t(group) * s.hidden * s.rank
                       : part + layout.router + int64_t(attribute) * inner * s.rank;
    for_tiles(inner_tiles, inner_share, [&](int row, int column, W value) {
      if (row < wanted && column < columns)
        target[int64_t(n0 + row) * s.rank + c0 + column] = value;
    });
    if (!expert) continue;
    for_tiles(output_tiles, output_share, [&](int row, int column, W value) {
      if (row < columns && column < wanted)
        part[(int64_t(group) * s.rank + c0 + row) * s.hidden + n0 + column] = value;
    });
    if (tid < kChunk) {
      if (n0 == 0 && tid < columns)
        part[layout.fc2_bias + int64_t(group) * s.rank + c0 + tid] = bias;
    } else if (tid < 2 * kChunk) {
      if (c0 == 0 && tid - kChunk < wanted)
        part[layout.fc1_bias + int64_t(group) * s.hidden + n0 + tid - kChunk] = bias;
    }
  }
}

}  // namespace spectralx::cuda
