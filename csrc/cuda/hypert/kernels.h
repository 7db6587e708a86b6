// The kernels of this room as torch-free functions on raw device pointers; 0 or a cudaError_t.
// `type` is that of the operands: 0 float, 1 double, 2 bfloat16, 3 half; "wide" pointers are float,
// double for double.
#pragma once
#include <cstdint>

extern "C" {

// Attention within windows of a map, or of plain rows of queries with all positions of it.
struct SpectralxAttention {
  int64_t type;
  int64_t images, heads, dim;
  int64_t queries;  // plain rows of queries an image; 0: the positions of the window
  int64_t rows, columns, height, width;  // window and map
  int64_t q_image, q_row, k_image, k_row;  // elements from one image, or position, to the next
  double scale;
  const void* q;
  const void* k;
  const void* v;  // strides as k
  const void* padding_k;  // [heads * dim], of positions outside the map; null: there are none
  const void* padding_v;
  void* out;  // [images, queries or height * width, heads * dim]
  const void* dout;
  void* dq;  // position `dq_row` apart; wide where dq_wide
  int64_t dq_row, dq_wide;
  void* dk;  // strides as k
  void* dv;  // null: added to dk
  void* log_sum;  // wide [heads, images * (queries or height * width)]
  void* slope;    // the same
  void* parts;    // wide [images * windows * tiles, 2, heads * dim]: gradients of padding_k and _v
};

// Tiles of the queries of a window, for the size of `parts`.
int64_t spectralx_attention_tiles(const SpectralxAttention* attention);
int spectralx_attention(const SpectralxAttention* attention, void* stream);
int spectralx_attention_backward(const SpectralxAttention* attention, void* stream);

// table, wide [4, channels], of which rows 0 and 1 are mean and variance: rows 2 and 3 become
// weight / sqrt(variance + eps) and bias.
int spectralx_norm_table(int64_t type, const void* weight, const void* bias, int64_t channels,
                         double eps, void* table, void* stream);

// out [batch, pixels, channels]: images [batch, bands, pixels], a channel of ones, zeros.
int spectralx_with_ones(int64_t type, const void* images, int64_t batch, int64_t pixels,
                        int64_t bands, int64_t channels, void* out, void* stream);
}
