// Backward by rows: recomputes routing, hidden layer and outputs of a tile from the normed z, and
// goes back through the log-sum-exp, the experts, the router and norm2 to the down product. What the
// weights' gradients need is left in global memory by slot: the n-th expert that a row takes.
#pragma once
#include "cuda/aomoa/forward.cuh"

namespace spectralx::cuda {

template <typename S>
struct BackwardTensors {
  const Wide<S>*normed, *statistics, *column_sums, *shift;
  const S *gamma, *beta;  // norm2
  const S* mixed_grad;    // [A, T, r]
  const Wide<S>*gates_grad, *load_grad;
  S *mixed, *normed_grad, *hidden_rows, *hidden_grad, *output_grad, *router_grad;
  Wide<S>*z_grad, *noise_grad, *row_terms, *norm_partial;
  short* slots;
};

constexpr int kBackwardTiles = 4;  // log gates, shares, gradients of clean and raw deviation

// Shared memory beside the mixture's; `overlay` replaces z.
template <typename S>
struct BackwardLayout {
  int router, slots, hidden_grad, row_sums, state, outputs, output_grad;

  __host__ __device__ explicit BackwardLayout(const MixtureSizes& s)
      : router(bytes<Wide<S>>(kBackwardTiles * s.tile * s.stride())),
        slots(bytes<unsigned short>(s.taken())),
        hidden_grad(bytes<Wide<S>>(s.taken() * hidden_stride(s))),
        row_sums(bytes<Wide<S>>(2 * s.tile)),
        state(bytes<Wide<S>>(2 * s.tile * s.state_stride())),
        outputs(bytes<Wide<S>>(s.taken() * s.state_stride())),
        output_grad(bytes<S>((s.taken() + 16) * operand_stride<S>(s.chunk))) {}

  __host__ __device__ static int hidden_stride(const MixtureSizes& s) {
    return static_cast<int>(round_up(s.hidden, 16)) + 8;
  }
  template <typename T>
  __host__ __device__ static int bytes(int64_t count) {
    return MixtureLayout<S>::template bytes<T>(count);
  }
  __host__ __device__ int overlay() const { return state + outputs + output_grad; }
};

template <typename S>
__host__ __device__ int backward_shared(const MixtureSizes& s) {
  const MixtureLayout<S> layout(s);
  const BackwardLayout<S> more(s);
  return layout.hidden + layout.staged + layout.router + layout.lists + more.router + more.slots +
         more.hidden_grad + more.row_sums + max(layout.z, more.overlay());
}

template <typename S>
struct Backward {
  using W = Wide<S>;
  const Mixture<S>& m;
  const BackwardTensors<S>& t;
  W *log_gates, *shares, *clean_grad, *raw_grad;  // [tile, stride]
  unsigned short* slots;                          // of the list's entries
  W* hidden_grad;                                 // [taken, hidden stride]
  W* row_sums;                                    // [2, tile]
  W *peaks, *totals;                              // [tile, state stride]
  W* outputs;                                     // [taken, state stride]: y + log gate
  S* output_grad;                                 // [taken + 16, operand stride]

  __device__ Backward(const Mixture<S>& mixture, const BackwardTensors<S>& tensors,
                      unsigned char* memory, unsigned char* overlay)
      : m(mixture), t(tensors) {
    const BackwardLayout<S> layout(m.s);
    const int tile = m.s.tile * m.s.stride();
    log_gates = reinterpret_cast<W*>(memory);
    shares = log_gates + tile;
    clean_grad = shares + tile;
    raw_grad = clean_grad + tile;
    memory += layout.router;
    slots = reinterpret_cast<unsigned short*>(memory);
    memory += layout.slots;
    hidden_grad = reinterpret_cast<W*>(memory);
    row_sums = reinterpret_cast<W*>(memory + layout.hidden_grad);
    peaks = reinterpret_cast<W*>(overlay);
    totals = peaks + m.s.tile * m.s.state_stride();
    outputs = reinterpret_cast<W*>(overlay + layout.state);
    output_grad = reinterpret_cast<S*>(overlay + layout.state + layout.outputs);
  }

  __device__ int width() const { return BackwardLayout<S>::hidden_stride(m.s); }
  __device__ int per_row() const { return m.s.dense ? m.s.experts : m.s.top_k; }
  // Of [R, K], for a place in an expert's list.
  __device__ int64_t slot(int e, int place) const {
    return (m.first + m.listed(e, place)) * per_row() + slots[m.offsets[e] + place];
  }

  __device__ void load_z() const {
    const int padded = static_cast<int>(round_up(m.s.rank, 16));
    for (int i = threadIdx.x; i < m.rows * padded; i += kThreads) {
      const int row = i / padded, j = i % padded;
      W value = 0;
      if (j < m.s.rank)
        value = t.normed[(m.first + row) * m.s.rank + j] * wide(t.gamma[j]) + wide(t.beta[j]);
      m.z[row * m.z_stride() + j] = narrow<S>(value);
    }
  }

  // Gates, as in forward; shares 0; each row's experts by slot.
  __device__ void gate_rows() const {
    if (int(threadIdx.x) >= m.rows) return;
    const MixtureSizes& s = m.s;
    const int at = threadIdx.x * s.stride();
    gates_of_row<W>(m.logits + at, m.clean + at, s.noisy ? m.deviation + at : nullptr, s.experts,
                    s.top_k, m.gates + at, shares + at);
    int used = 0;
    short* row_slots = t.slots + (m.first + threadIdx.x) * per_row();
    for (int e = 0; e < s.experts; ++e) {
      const W gate = m.gates[at + e];
      log_gates[at + e] = logarithm(gate);
      shares[at + e] = 0;
      if (s.dense || gate != W(0)) row_slots[used++] = static_cast<short>(e);
    }
    for (; used < per_row(); ++used) row_slots[used] = -1;
  }

  // Slots of the list's entries; hidden rows to global memory; hidden_grad 0.
  __device__ void store_hidden() const {
    const MixtureSizes& s = m.s;
    for (int e = 0; e < s.experts; ++e) {
      for (int place = threadIdx.x; place < m.count(e); place += kThreads) {
        const W* gates = m.gates + m.listed(e, place) * s.stride();
        int used = 0;
        for (int other = 0; other < e; ++other) used += s.dense || gates[other] != W(0);
        slots[m.offsets[e] + place] = static_cast<unsigned short>(used);
      }
    }
    for (int i = threadIdx.x; i < s.taken() * width(); i += kThreads) hidden_grad[i] = 0;
    __syncthreads();
    for (int e = 0; e < s.experts; ++e) {
      for (int i = threadIdx.x; i < m.count(e) * s.hidden; i += kThreads) {
        const int place = i / s.hidden, n = i % s.hidden;
        t.hidden_rows[slot(e, place) * s.hidden + n] =
            m.hidden[(m.offsets[e] + place) * m.hidden_stride() + n];
      }
    }
  }

  // Columns c0 on of the combination, and back through it: output_grad, shares, hidden_grad.
  __device__ void outputs_backward(int c0, int columns) const {
    const MixtureSizes& s = m.s;
    for (int i = threadIdx.x; i < s.tile * s.state_stride(); i += kThreads) {
      peaks[i] = W(-INFINITY);
      totals[i] = 0;
    }
    for (int e = 0; e < s.experts; ++e) {
      if (m.count(e) == 0) continue;
      m.output_layer(e, c0, columns, [&](int place, int column, W y) {
        const int row = m.listed(e, place), at = row * s.state_stride() + column;
        const bool taken = m.gates[row * s.stride() + e] != W(0);
        const W term = taken ? y + log_gates[row * s.stride() + e] : W(-INFINITY);
        outputs[(m.offsets[e] + place) * s.state_stride() + column] = term;
        if (taken) add_term(term, peaks[at], totals[at]);
      });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m.rows * columns; i += kThreads) {
      const int row = i / columns, at = row * s.state_stride() + i % columns;
      totals[at] = log_total(peaks[at], totals[at]);
      t.mixed[(m.first + row) * s.rank + c0 + i % columns] = narrow<S>(totals[at]);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, padded = static_cast<int>(round_up(columns, 16));
    for (int e = 0; e < s.experts; ++e) {
      for (int place = threadIdx.x / 32; place < m.count(e); place += kWarps) {
        const int row = m.listed(e, place), entry = m.offsets[e] + place;
        const bool taken = m.gates[row * s.stride() + e] != W(0);
        const S* mixed_grad = t.mixed_grad + m.position(row) * s.rank + c0;
        S* target = t.output_grad + slot(e, place) * s.rank + c0;
        W share = 0;
        for (int column = lane; column < padded; column += 32) {
          W grad = 0;
          if (taken && column < columns) {
            const W term = outputs[entry * s.state_stride() + column];
            grad = wide(mixed_grad[column]) *
                   exponential(term - totals[row * s.state_stride() + column]);
          }
          share += grad;
          output_grad[entry * operand_stride<S>(s.chunk) + column] = narrow<S>(grad);
          if (column < columns) target[column] = narrow<S>(grad);
        }
        share = warp_sum(share);
        if (lane == 0) shares[row * s.stride() + e] += share;
      }
    }
    hidden_backward(c0, columns);
  }

  // hidden_grad += output_grad fc2, over the columns at hand.
  __device__ void hidden_backward(int c0, int columns) const {
    const MixtureSizes& s = m.s;
    const int stride = operand_stride<S>(s.chunk);
    for (int e = 0; e < s.experts; ++e) {
      if (m.count(e) == 0) continue;
      for (int n0 = 0; n0 < s.hidden; n0 += kChunk) {
        const int wanted = min(kChunk, s.hidden - n0);
        const Share share(static_cast<int>(ceil_div(m.count(e), 16)),
                          static_cast<int>(ceil_div(wanted, 8)));
        const S* low =
            output_grad + (m.offsets[e] + share.row * 16 + threadIdx.x % 32 / 4) * stride;
        __syncthreads();
        stage_transposed(m.staged, stride, static_cast<int>(round_up(wanted, 16)),
                         m.weights.fc2 + (int64_t(e) * s.rank + c0) * s.hidden + n0, s.hidden,
                         wanted, columns);
        __syncthreads();
        Tiles<W> tiles;
        multiply<S>(tiles, low, low + 8 * stride, m.staged, stride, share, columns);
        for_tiles(tiles, share, [&](int row, int column, W value) {
          if (row < m.count(e) && column < wanted)
            hidden_grad[(m.offsets[e] + row) * width() + n0 + column] += value;
        });
      }
    }
    __syncthreads();
  }

  // Through the ReLU: the gradient takes the hidden layer's place, and goes to global memory.
  __device__ void relu_backward() const {
    const MixtureSizes& s = m.s;
    for (int e = 0; e < s.experts; ++e) {
      for (int i = threadIdx.x; i < m.count(e) * s.hidden; i += kThreads) {
        const int place = i / s.hidden, n = i % s.hidden, entry = m.offsets[e] + place;
        S& hidden = m.hidden[entry * m.hidden_stride() + n];
        const W grad = wide(hidden) <= W(0) ? W(0) : hidden_grad[entry * width() + n];
        hidden = narrow<S>(grad);
        t.hidden_grad[slot(e, place) * s.hidden + n] = hidden;
      }
    }
  }

  __device__ void router_backward() const {
    if (int(threadIdx.x) >= m.rows) return;
    const MixtureSizes& s = m.s;
    const int row = threadIdx.x, at = row * s.stride();
    const int64_t position = m.position(row) * s.experts;
    for (int e = 0; e < s.experts && t.gates_grad != nullptr; ++e) {
      const W gate = m.gates[at + e];
      if (gate != W(0)) shares[at + e] += gate * t.gates_grad[position + e];
    }
    const W* load_grad =
        t.load_grad == nullptr ? nullptr : t.load_grad + m.attribute(row) * s.experts;
    const W* noise = s.noisy ? m.weights.noise + position : nullptr;
    route_backward<W>(m.logits + at, m.clean + at, s.noisy ? m.deviation + at : nullptr, m.raw + at,
                      noise, shares + at, load_grad, s.experts, s.top_k, clean_grad + at,
                      raw_grad + at, shares + at);
    S* target = t.router_grad + (m.first + row) * 2 * s.experts;
    for (int e = 0; e < s.experts; ++e) {
      target[e] = narrow<S>(clean_grad[at + e]);
      target[s.experts + e] = narrow<S>(s.noisy ? raw_grad[at + e] : W(0));
      if (s.noisy && t.noise_grad != nullptr)
        t.noise_grad[position + e] = shares[at + e] * m.deviation[at + e];
    }
  }

  // Columns c0 on of z's gradient, from experts and router, to global memory; row_sums with it.
  __device__ void z_backward(int c0, int columns) const {
    const MixtureSizes& s = m.s;
    const int stride = operand_stride<S>(kChunk);
    for (int i = threadIdx.x; i < m.rows * columns; i += kThreads) {
      const int row = i / columns, column = i % columns, at = row * s.stride();
      const int64_t weight =
          (int64_t(m.attribute(row)) * s.rank + c0 + column) * s.experts;
      W sum = 0;
      for (int e = 0; e < s.experts; ++e) {
        sum += clean_grad[at + e] * wide(m.weights.gate[weight + e]);
        if (s.noisy) sum += raw_grad[at + e] * wide(m.weights.gate_noise[weight + e]);
      }
      peaks[row * s.state_stride() + column] = sum;
    }
    for (int e = 0; e < s.experts; ++e) {
      if (m.count(e) == 0) continue;
      const Share share(static_cast<int>(ceil_div(m.count(e), 16)),
                        static_cast<int>(ceil_div(columns, 8)));
      const S* low = m.hidden +
                     (m.offsets[e] + share.row * 16 + threadIdx.x % 32 / 4) * m.hidden_stride();
      Tiles<W> tiles;
      for (int k0 = 0; k0 < s.hidden; k0 += kChunk) {
        const int depth = min(kChunk, s.hidden - k0);
        __syncthreads();
        stage_transposed(m.staged, stride, static_cast<int>(round_up(columns, 16)),
                         m.weights.fc1 + (int64_t(e) * s.hidden + k0) * s.rank + c0, s.rank,
                         columns, depth);
        __syncthreads();
        multiply<S>(tiles, low + k0, low + k0 + 8 * m.hidden_stride(), m.staged, stride, share,
                    depth);
      }
      for_tiles(tiles, share, [&](int row, int column, W value) {
        if (row < m.count(e) && column < columns)
          peaks[m.listed(e, row) * s.state_stride() + column] += value;
      });
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < m.rows; row += kWarps) {
      const int64_t start = (m.first + row) * s.rank + c0;
      W sum = 0, normed_sum = 0;
      for (int column = lane; column < columns; column += 32) {
        const W grad = peaks[row * s.state_stride() + column];
        t.z_grad[start + column] = grad;
        sum += grad * wide(t.gamma[c0 + column]);
        normed_sum += grad * wide(t.gamma[c0 + column]) * t.normed[start + column];
      }
      sum = warp_sum(sum);
      normed_sum = warp_sum(normed_sum);
      if (lane > 0) continue;
      row_sums[row] = c0 == 0 ? sum : row_sums[row] + sum;
      row_sums[m.s.tile + row] = c0 == 0 ? normed_sum : row_sums[m.s.tile + row] + normed_sum;
    }
    __syncthreads();
  }

  // Through norm2. normed_grad is the gradient of x folded^T; its sums over rows, with the norms',
  // are the block's part: of gamma2, of beta2, of z0, and of normed_grad * mean1.
  __device__ void norm_backward() const {
    const MixtureSizes& s = m.s;
    const int64_t plane = int64_t(s.attributes) * s.tokens;
    for (int j = threadIdx.x; j < s.rank; j += kThreads) {
      W sums[4] = {};
      for (int row = 0; row < m.rows; ++row) {
        const int64_t at = (m.first + row) * s.rank + j, position = m.position(row);
        const W grad = t.z_grad[at], normed = t.normed[at];
        const W mean = row_sums[row] / W(s.rank), slope = row_sums[s.tile + row] / W(s.rank);
        const W z0_grad = t.statistics[2 * plane + position] *
                          (grad * wide(t.gamma[j]) - mean - normed * slope);
        const S scaled = narrow<S>(z0_grad * t.statistics[plane + position]);
        t.normed_grad[at] = scaled;
        sums[0] += grad * normed;
        sums[1] += grad;
        sums[2] += z0_grad;
        sums[3] += wide(scaled) * t.statistics[position];
      }
      for (int i = 0; i < 4; ++i)
        t.norm_partial[(int64_t(blockIdx.x) * 4 + i) * s.rank + j] = sums[i];
    }
    __syncthreads();
  }

  // What norm1 adds to a row of x's gradient: row_terms[0] x + row_terms[1].
  __device__ void row_backward(int width) const {
    const MixtureSizes& s = m.s;
    const int64_t plane = int64_t(s.attributes) * s.tokens;
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < m.rows; row += kWarps) {
      const int64_t position = m.position(row);
      const W mean1 = t.statistics[position], rstd1 = t.statistics[plane + position];
      const W deviation2 = W(1) / t.statistics[2 * plane + position];
      W mean = 0, slope = 0;
      for (int j = lane; j < s.rank; j += 32) {
        const int64_t at = (m.first + row) * s.rank + j;
        const W grad = wide(t.normed_grad[at]);
        mean += grad * t.column_sums[j];
        // z0 less its mean, which drops out: the gradient of a norm's input sums to 0.
        slope += grad * (t.normed[at] * deviation2 - t.shift[j]);
      }
      mean = warp_sum(mean) / W(width);
      slope = warp_sum(slope) / W(width);
      if (lane > 0) continue;
      t.row_terms[2 * (m.first + row)] = -rstd1 * slope;
      t.row_terms[2 * (m.first + row) + 1] = mean1 * rstd1 * slope - mean;
    }
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    mixture_backward(MixtureSizes s, MixtureWeights<S> weights, BackwardTensors<S> t, int width) {
  unsigned char* memory = dynamic_shared();
  Mixture<S> m(s, weights, memory);
  const BackwardLayout<S> layout(s);
  unsigned char* own = reinterpret_cast<unsigned char*>(m.z);
  unsigned char* overlay =
      own + layout.router + layout.slots + layout.hidden_grad + layout.row_sums;
  m.z = reinterpret_cast<S*>(overlay);
  const Backward<S> b(m, t, own, overlay);
  b.load_z();
  __syncthreads();
  m.score(t.normed, t.gamma, t.beta);
  __syncthreads();
  b.gate_rows();
  __syncthreads();
  m.group();
  m.hidden_layer();
  b.store_hidden();
  for (int c0 = 0; c0 < s.rank; c0 += s.chunk)
    b.outputs_backward(c0, min(s.chunk, s.rank - c0));
  b.relu_backward();
  b.router_backward();
  __syncthreads();
  for (int c0 = 0; c0 < s.rank; c0 += s.chunk)
    b.z_backward(c0, min(s.chunk, s.rank - c0));
  b.norm_backward();
  b.row_backward(width);
}

}  // namespace spectralx::cuda
