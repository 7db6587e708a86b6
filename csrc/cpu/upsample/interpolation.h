// Bilinear interpolation along one axis, shifted by the taps of a kernel, as sparse rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace spectralx::cpu {

// One weight of R_s: output `out` of tap `tap` takes `weight` times line `line` of the small map.
template <typename A>
struct Term {
  int64_t tap, line, out;
  A weight;
};

// The matrices R_s (or C_t) of all taps: at most two weights a tap and output, none in the padding.
template <typename A>
struct Axis {
  int64_t length, taps, outs;      // of the small map, of the kernel, of the output
  std::vector<Term<A>> by_out;     // ordered by out, then tap, then line
  std::vector<Term<A>> by_line;    // ordered by line, then tap, then out
  std::vector<int64_t> first_of_out, first_of_line;  // [outs + 1], [length * taps + 1]

  Axis(int64_t length_, int64_t size, int64_t kernel, int64_t padding, bool align_corners)
      : length(length_), taps(kernel), outs(size + 2 * padding - kernel + 1) {
    // As torch.nn.functional.interpolate places the samples.
    const double scale = align_corners
                             ? (size > 1 ? static_cast<double>(length - 1) / (size - 1) : 0.0)
                             : static_cast<double>(length) / size;
    first_of_out.push_back(0);
    for (int64_t out = 0; out < outs; ++out) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = out + tap - padding;
        if (at >= 0 && at < size) add(out, tap, at, scale, align_corners);
      }
      first_of_out.push_back(static_cast<int64_t>(by_out.size()));
    }
    by_line = by_out;
    std::stable_sort(by_line.begin(), by_line.end(), [this](const Term<A>& a, const Term<A>& b) {
      return a.line * taps + a.tap < b.line * taps + b.tap;
    });
    first_of_line.assign(length * taps + 1, 0);
    for (const Term<A>& term : by_line) ++first_of_line[term.line * taps + term.tap + 1];
    for (int64_t i = 0; i < length * taps; ++i) first_of_line[i + 1] += first_of_line[i];
  }

  // Lines [first, last) of the small map that outputs [begin, end) need.
  std::pair<int64_t, int64_t> lines_of(int64_t begin, int64_t end) const {
    int64_t first = length, last = 0;
    for (int64_t i = first_of_out[begin]; i < first_of_out[end]; ++i) {
      first = std::min(first, by_out[i].line);
      last = std::max(last, by_out[i].line + 1);
    }
    return {std::min(first, last), last};
  }

  int64_t most_terms() const {
    int64_t most = 0;
    for (int64_t i = 0; i < outs; ++i) most = std::max(most, first_of_out[i + 1] - first_of_out[i]);
    for (int64_t i = 0; i < length * taps; ++i) {
      most = std::max(most, first_of_line[i + 1] - first_of_line[i]);
    }
    return most;
  }

 private:
  void add(int64_t out, int64_t tap, int64_t at, double scale, bool align_corners) {
    const double place = align_corners ? at * scale : std::max((at + 0.5) * scale - 0.5, 0.0);
    const int64_t below = std::min(static_cast<int64_t>(place), length - 1);
    const double share = place - static_cast<double>(below);
    if (below + 1 == length || share == 0.0) {
      by_out.push_back({tap, below, out, A(1)});
    } else {
      by_out.push_back({tap, below, out, static_cast<A>(1.0 - share)});
      by_out.push_back({tap, below + 1, out, static_cast<A>(share)});
    }
  }
};

}  // namespace spectralx::cpu
