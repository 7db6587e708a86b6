// The kernels of this room as torch-free functions on raw device pointers; 0 or a cudaError_t.
// `type` is that of noise, tokens or prediction: 0 float, 1 double, 2 bfloat16, 3 half; "wide"
// pointers are float, double for double. Everything is contiguous but predictions. Null: not given,
// not wanted.
#pragma once
#include <cstdint>

extern "C" {

// kept, int64 [B, keep], masked, bool [B, tokens] and restore, int64 [B, tokens], from noise
// [B, tokens].
int spectralx_rank_tokens(int64_t type, const void* noise, int64_t batch, int64_t tokens,
                          int64_t keep, void* kept, void* masked, void* restore, void* stream);

// out [B, count, width]: row ids[b, i] of tokens [B, kept, width] or, where there is none, filler
// [width]; zeros without it. `size`: bytes of an element, 2, 4 or 8. ids: int64 [B, count].
int spectralx_move_tokens(int64_t size, const void* tokens, const void* ids, const void* filler,
                          int64_t batch, int64_t kept, int64_t count, int64_t width, void* out,
                          void* stream);

// The transpose: tokens [B, kept, width] from grad [B, count, width], and rest, wide [B, width], the
// sums of the rows that went to no token.
int spectralx_collect_tokens(int64_t type, const void* grad, const void* ids, int64_t batch,
                             int64_t kept, int64_t count, int64_t width, void* tokens, void* rest,
                             void* stream);

// One pass over a prediction [B, bands, height, width], cut into cells of pixels with all their bands,
// and what it is compared with, made of images [B, bands, image_height, image_width].
struct SpectralxErrors {
  int64_t type, image_type;  // image_type: `type`, or that of wide
  int64_t mask_type;         // 0 to 3 as `type`, 4 bool or uint8, 5 int64
  int64_t batch, bands, height, width, image_height, image_width;
  int64_t cell_rows, cell_columns;  // of a cell in pixels; those at the edges may be smaller
  int64_t absolute;                 // |p - t|, else (p - t)^2
  // Strides of the prediction in elements.
  int64_t by_image, by_cell_row, by_cell_column, by_row, by_column, by_band;
  double factor;
  const void* prediction;
  const void* images;
  const void* mask;      // [B, cells]: cells of 0 are not read; null: ones
  void* errors;          // wide [B, cells]: sums over a cell, not times the mask
  void* gradient;        // as prediction, and then no errors: d errors times factor mask upstream / count
  const void* upstream;  // of `type`, [1]
  const void* count;     // wide [1]; null: 1
};

int64_t spectralx_error_cells(const SpectralxErrors* pass);  // of an image
// Cells are patches; the target is the image or, with `normalize`, its patches of mean 0, variance 1.
int spectralx_patch_errors(const SpectralxErrors* pass, int64_t normalize, void* stream);
// The target is the images, resized bilinearly.
int spectralx_resized_errors(const SpectralxErrors* pass, void* stream);
// full: the images repeated to the size of `high`. Targets: full less `base` resized bilinearly, and
// full averaged to the size of `low`. One launch; a pass with neither errors nor gradient is left out.
int spectralx_band_errors(const SpectralxErrors* high, const SpectralxErrors* low, const void* base,
                          int64_t base_height, int64_t base_width, void* stream);
// base, wide [B, bands, base_height, base_width]: full averaged; count, wide [1]: of high's mask.
int spectralx_band_base(const SpectralxErrors* high, int64_t base_height, int64_t base_width,
                        void* base, void* count, void* stream);
// count, wide [1]: the sum of the mask, 1 where that is 0.
int spectralx_mask_count(const SpectralxErrors* pass, void* count, void* stream);
// loss, of first's `type`, [1]: the errors times their passes' factors, over the count of the mask.
int spectralx_mean_error(const SpectralxErrors* first, const SpectralxErrors* second, void* loss,
                         void* stream);
}
