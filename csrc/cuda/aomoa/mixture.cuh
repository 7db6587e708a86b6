// The middle of the layer, in shared memory: a block takes a tile of rows (row = token * A +
// attribute) from z through routing to the experts. What forward and backward have in common.
//
// Experts run grouped by default: the rows of the tile that take an expert are listed, expert after
// expert, and its products run on the listed rows only; `dense` lists every row for every expert.
// Counts and offsets never leave the block.
#pragma once
#include "cuda/aomoa/router.cuh"
#include "cuda/common/tile.cuh"

namespace spectralx::cuda {

struct MixtureSizes {
  int tokens, attributes, rank, hidden, experts, top_k;
  int tile;    // rows of a block: 64, 32, ... 1
  int chunk;   // columns of the rank combined at once: 64, 32 or 16
  int dense;   // every row runs through every expert
  int noisy;   // training

  __host__ __device__ int64_t rows() const { return int64_t(tokens) * attributes; }
  __host__ __device__ int taken() const { return tile * (dense ? experts : top_k); }
  __host__ __device__ int stride() const { return experts | 1; }
  // Of [tile, chunk] values; a warp's pairs of columns meet all banks.
  __host__ __device__ int state_stride() const { return chunk + 8; }
};

template <typename S>
struct MixtureWeights {
  const S *gate, *gate_noise;                // [A, r, E]
  const Wide<S>* noise;                      // [A, T, E]
  const S *fc1, *fc1_bias, *fc2, *fc2_bias;  // [E, h, r], [E, h], [E, r, h], [E, r]
};

constexpr int kRouterTiles = 5;  // logits, clean, deviation, raw deviation, gates

// Bytes of shared memory, each part a multiple of 16.
template <typename S>
struct MixtureLayout {
  int z, hidden, staged, router, lists;

  __host__ __device__ explicit MixtureLayout(const MixtureSizes& s)
      : z(bytes<S>(s.tile * operand_stride<S>(s.rank))),
        // A product's last tile may read 15 rows more than there are.
        hidden(bytes<S>((s.taken() + 16) * operand_stride<S>(s.hidden))),
        staged(bytes<S>(kChunk * operand_stride<S>(kChunk))),
        router(bytes<Wide<S>>(kRouterTiles * s.tile * s.stride())),
        lists(bytes<int>(s.experts + 1) + bytes<unsigned short>(s.taken())) {}

  template <typename T>
  __host__ __device__ static int bytes(int64_t count) {
    return static_cast<int>(round_up(count * static_cast<int64_t>(sizeof(T)), 16));
  }
};

template <typename S>
struct Mixture {
  using W = Wide<S>;
  MixtureSizes s;
  MixtureWeights<S> weights;
  int64_t first;   // row of the tile
  int rows;        // of the tile, less at the end
  S *hidden, *staged, *z;
  W *logits, *clean, *deviation, *raw, *gates;  // [tile, stride]
  int* offsets;                                  // [E + 1] into list and hidden
  unsigned short* list;                          // rows of the tile, by expert

  // Takes its parts from `memory`; z comes last and may be overlaid once the hidden layer is done.
  __device__ Mixture(const MixtureSizes& sizes, const MixtureWeights<S>& w, unsigned char* memory)
      : s(sizes), weights(w) {
    const MixtureLayout<S> layout(s);
    first = int64_t(blockIdx.x) * s.tile;
    rows = static_cast<int>(min(int64_t(s.tile), s.rows() - first));
    const auto part = [&](int size) {
      unsigned char* at = memory;
      memory += size;
      return at;
    };
    hidden = reinterpret_cast<S*>(part(layout.hidden));
    staged = reinterpret_cast<S*>(part(layout.staged));
    logits = reinterpret_cast<W*>(part(layout.router));
    clean = logits + s.tile * s.stride();
    deviation = clean + s.tile * s.stride();
    raw = deviation + s.tile * s.stride();
    gates = raw + s.tile * s.stride();
    offsets = reinterpret_cast<int*>(part(layout.lists));
    list = reinterpret_cast<unsigned short*>(offsets + round_up(s.experts + 1, 4));
    z = reinterpret_cast<S*>(memory);
  }

  __device__ int z_stride() const { return operand_stride<S>(s.rank); }
  __device__ int hidden_stride() const { return operand_stride<S>(s.hidden); }
  __device__ int attribute(int row) const { return static_cast<int>((first + row) % s.attributes); }
  // Of [A, T], for the tile's row.
  __device__ int64_t position(int row) const {
    return (first + row) % s.attributes * s.tokens + (first + row) / s.attributes;
  }
  __device__ int count(int expert) const { return offsets[expert + 1] - offsets[expert]; }
  __device__ int listed(int expert, int place) const { return list[offsets[expert] + place]; }

  // Fills logits, clean and, with noise, deviation and raw from z = normed gamma + beta, which is not
  // rounded here: rounded, it would give rows to other experts. A barrier on either side is the
  // caller's.
  __device__ void score(const W* normed, const S* gamma, const S* beta) const {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
      const int64_t weight = int64_t(attribute(row)) * s.rank * s.experts;
      for (int e0 = 0; e0 < s.experts; e0 += 4) {
        W sums[4] = {}, noise_sums[4] = {};
        for (int j = lane; j < s.rank; j += 32) {
          const W value =
              normed[(first + row) * s.rank + j] * wide(gamma[j]) + wide(beta[j]);
          const int64_t at = weight + int64_t(j) * s.experts + e0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (e0 + i >= s.experts) break;
            sums[i] += value * wide(weights.gate[at + i]);
            if (s.noisy) noise_sums[i] += value * wide(weights.gate_noise[at + i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (e0 + i >= s.experts) break;
          const int at = row * s.stride() + e0 + i;
          const W sum = warp_sum(sums[i]), noise_sum = s.noisy ? warp_sum(noise_sums[i]) : W(0);
          if (lane > 0) continue;
          clean[at] = sum;
          if (s.noisy) {
            const W std = softplus(noise_sum) + W(kNoiseFloor);
            raw[at] = noise_sum;
            deviation[at] = std;
            logits[at] =
                sum + weights.noise[position(row) * s.experts + e0 + i] * std;
          } else {
            logits[at] = sum;
          }
        }
      }
    }
  }

  // Lists the rows of every expert; gates must be set.
  __device__ void group() const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto takes = [&](int row, int e) {
      return row < rows && (s.dense || gates[row * s.stride() + e] != W(0));
    };
    for (int e = warp; e < s.experts; e += kWarps) {
      int total = 0;
      for (int row = lane; row < s.tile + lane; row += 32)
        total += __popc(__ballot_sync(0xffffffffu, row < s.tile && takes(row, e)));
      if (lane == 0) offsets[e + 1] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      offsets[0] = 0;
      for (int e = 0; e < s.experts; ++e) offsets[e + 1] += offsets[e];
    }
    __syncthreads();
    for (int e = warp; e < s.experts; e += kWarps) {
      int place = offsets[e];
      for (int row = lane; row < s.tile + lane; row += 32) {
        const bool taken = row < s.tile && takes(row, e);
        const unsigned votes = __ballot_sync(0xffffffffu, taken);
        if (taken) list[place + __popc(votes & ((1u << lane) - 1))] = row;
        place += __popc(votes);
      }
    }
    __syncthreads();
  }

  // hidden[list] = relu(z fc1^T + bias) of every expert, zeros up to a multiple of 16.
  __device__ void hidden_layer() const {
    const int stride = operand_stride<S>(kChunk), padded = static_cast<int>(round_up(s.hidden, 16));
    for (int e = 0; e < s.experts; ++e) {
      if (count(e) == 0) continue;
      const int row_tiles = static_cast<int>(ceil_div(count(e), 16));
      for (int n0 = 0; n0 < s.hidden; n0 += kChunk) {
        const int columns = min(kChunk, s.hidden - n0);
        const Share share(row_tiles, static_cast<int>(ceil_div(min(kChunk, padded - n0), 8)));
        const int place = share.row * 16 + threadIdx.x % 32 / 4;
        const S* low = z + listed(e, min(place, count(e) - 1)) * z_stride();
        const S* high = z + listed(e, min(place + 8, count(e) - 1)) * z_stride();
        Tiles<W> tiles;
        for (int k0 = 0; k0 < s.rank; k0 += kChunk) {
          const int depth = min(kChunk, s.rank - k0);
          __syncthreads();
          stage(staged, stride, static_cast<int>(round_up(columns, 16)),
                weights.fc1 + (int64_t(e) * s.hidden + n0) * s.rank + k0, s.rank, columns, depth);
          __syncthreads();
          multiply<S>(tiles, low + k0, high + k0, staged, stride, share, depth);
        }
        for_tiles(tiles, share, [&](int row, int column, W value) {
          if (row >= count(e)) return;
          W sum = 0;
          if (column < columns) {
            sum = value + wide(weights.fc1_bias[e * s.hidden + n0 + column]);
            sum = sum < W(0) ? W(0) : sum;  // NaN stays
          }
          hidden[(offsets[e] + row) * hidden_stride() + n0 + column] = narrow<S>(sum);
        });
      }
    }
    __syncthreads();
  }

  // Calls use(row's place in the expert's list, column in the chunk, y) for y = hidden fc2^T + bias
  // of expert e, columns c0 to c0 + `columns`.
  template <typename Use>
  __device__ void output_layer(int e, int c0, int columns, Use use) const {
    const int stride = operand_stride<S>(kChunk);
    const Share share(static_cast<int>(ceil_div(count(e), 16)),
                      static_cast<int>(ceil_div(columns, 8)));
    const S* low =
        hidden + (offsets[e] + share.row * 16 + threadIdx.x % 32 / 4) * hidden_stride();
    Tiles<W> tiles;
    for (int k0 = 0; k0 < s.hidden; k0 += kChunk) {
      const int depth = min(kChunk, s.hidden - k0);
      __syncthreads();
      stage(staged, stride, static_cast<int>(round_up(columns, 16)),
            weights.fc2 + (int64_t(e) * s.rank + c0) * s.hidden + k0, s.hidden, columns, depth);
      __syncthreads();
      multiply<S>(tiles, low + k0, low + k0 + 8 * hidden_stride(), staged, stride, share, depth);
    }
    for_tiles(tiles, share, [&](int row, int column, W value) {
      if (row < count(e) && column < columns)
        use(row, column, value + wide(weights.fc2_bias[e * s.rank + c0 + column]));
    });
  }
};

}  // namespace spectralx::cuda
