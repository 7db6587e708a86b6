// Transposition in blocks, for files compiled once for each instruction set: include it between
// SPECTRALX_BEGIN_TARGET and SPECTRALX_END_TARGET, after <algorithm> and <cstdint>.
#pragma once

namespace {

// to[c * to_row + r] = from[r * row + c]
template <typename S>
void transpose(const S* from, int64_t rows, int64_t columns, int64_t row, int64_t to_row, S* to) {
  constexpr int64_t kBlock = 16;
  for (int64_t c = 0; c < columns; c += kBlock) {
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t width = std::min(kBlock, columns - c), height = std::min(kBlock, rows - r);
      for (int64_t k = 0; k < width; ++k) {
        for (int64_t i = 0; i < height; ++i) {
          to[(c + k) * to_row + r + i] = from[(r + i) * row + c + k];
        }
      }
    }
  }
}

}  // namespace
