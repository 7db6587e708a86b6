// The pass of errors.h. A task is a row of cells of one image; every cell's sum is its own, so the
// bits of the result are the same for any number of threads. Predictions are read in the order they
// lie in, a band of the row of cells after the other where they are planar.
#include "cpu/torch.h"

#include "cpu/reconstruction/errors.h"

#include <vector>

namespace spectralx::cpu {
namespace {

constexpr int64_t kTile = 1024;  // values at most that are compared at a time, or those of a pixel
constexpr int64_t kPixels = 16;  // larger tiles are multiples of so many: they end as cache lines do
constexpr int64_t kJoin = 4096;  // values, about, of a cell that are summed in T

// Cells of a row that are treated alike, or a part of one: `pixels` of each of `cells`, from column x.
struct Piece {
  int64_t cell, cells, x, pixels;
  bool counts;  // the weight is not 0
};

template <typename T>
struct Worker {
  const ErrorPass& pass;
  const Pixels& pixels = pass.pixels;
  const bool planar = pixels.layout == Layout::kPlanar;
  const int64_t channels = planar ? 1 : pixels.bands;  // values of a pixel that lie side by side
  const RowKernels<T>& kernels = row_kernels<T>();
  Reader<T> prediction{pass.prediction};
  Writer<T> gradient{pass.gradient};
  const double* weight = pass.weight.defined() ? pass.weight.const_data_ptr<double>() : nullptr;
  double* errors = pass.errors.defined() ? pass.errors.mutable_data_ptr<double>() : nullptr;
  std::unique_ptr<Target<T>> target;
  std::vector<Piece> pieces;     // of a row of this row of cells
  std::vector<T> factors, sums;  // [columns], [columns, kPartial]
  std::vector<T> made, predicted, out;

  Worker(const ErrorPass& pass_, const MakeTarget<T>& make_target)
      : pass(pass_), target(make_target()), factors(pixels.columns()),
        sums(pixels.columns() * kPartial) {
    for (std::vector<T>* buffer : {&made, &predicted, &out}) {
      buffer->resize(std::max(kTile, channels));
    }
  }

  void task(int64_t index) {
    const int64_t image = index / pixels.rows(), row = index % pixels.rows();
    const int64_t begin = row * pixels.cell_height;
    const int64_t end = std::min(begin + pixels.cell_height, pixels.height);
    const int64_t first = index * pixels.columns();  // cell
    target->open(image, begin, end);
    cut(weight ? weight + first : nullptr);
    double* totals = errors ? errors + first : nullptr;
    if (totals) std::fill_n(totals, pixels.columns(), 0.0);
    int64_t summed = 0;
    for (int64_t band = 0; band < (planar ? pixels.bands : 1); ++band) {
      for (int64_t y = begin; y < end; ++y) {
        for (const Piece& piece : pieces) compare(image, band, y, piece);
        summed += pixels.cell_width * channels;
        if (totals && summed >= kJoin) join(totals), summed = 0;
      }
    }
    if (totals) join(totals);
    gradient.finish();
  }

  void join(double* totals) { kernels.join(sums.data(), pixels.columns(), totals); }

  // Pieces of at most kTile values, and the factor of each cell's gradient.
  void cut(const double* weights) {
    pieces.clear();
    int64_t most = std::max<int64_t>(kTile / channels, 1);
    if (most > kPixels) most -= most % kPixels;
    const int64_t width = pixels.cell_width;
    const double slope = pass.factor * (pass.absolute ? 1 : 2);
    for (int64_t cell = 0; cell < pixels.columns(); ++cell) {
      const double share = weights ? weights[cell] : 1.0;
      factors[cell] = static_cast<T>(share * slope);
      const bool counts = share != 0;
      if (!pieces.empty() && width * (pieces.back().cells + 1) <= most &&
          pieces.back().counts == counts) {
        ++pieces.back().cells;
        continue;
      }
      for (int64_t x = 0; x < width; x += most) {
        pieces.push_back({cell, 1, cell * width + x, std::min(most, width - x), counts});
      }
    }
  }

  void compare(int64_t image, int64_t band, int64_t y, const Piece& piece) {
    const int64_t n = piece.pixels * channels, cells = piece.cells;
    const int64_t at = pixels.at(image, band, y, piece.x, piece.cell);
    const int64_t step =
        pixels.layout == Layout::kPatches ? pixels.cell_height * pixels.cell_width * channels : n;
    // Runs of cells that lie behind each other are one.
    const int64_t runs = step == n ? 1 : cells, length = cells * n / runs;
    if (!piece.counts) {
      for (int64_t i = 0; i < runs && gradient.wanted(); ++i) gradient.clear(at + i * step, length);
      return;
    }
    // On their way while the target is made.
    for (int64_t i = 0; i < runs; ++i) prediction.prefetch(at + i * step, length);
    const int64_t width = cells * piece.pixels;
    const Lines<T> wanted = planar ? target->run(band, y, piece.x, width, made.data())
                                   : target->line(y, piece.x, width, made.data());
    const T* p = prediction.read(at, 0, predicted.data());
    const bool converted = p == predicted.data();
    for (int64_t i = 0; i < runs && converted; ++i) {
      prediction.read(at + i * step, length, predicted.data() + i * length);
    }
    const int64_t behind = converted ? n : step;
    if (errors) {
      const auto add = pass.absolute ? kernels.absolutes : kernels.squares;
      add(p, behind, wanted, cells, n, sums.data() + piece.cell * kPartial);
    }
    if (!gradient.wanted()) return;
    (pass.absolute ? kernels.sign : kernels.difference)(
        p, behind, wanted, cells, n, factors.data() + piece.cell, out.data());
    for (int64_t i = 0; i < runs; ++i) {
      gradient.write(at + i * step, length, out.data() + i * length);
    }
  }
};

}  // namespace

template <typename T>
void run(const ErrorPass& pass, const MakeTarget<T>& make_target) {
  at::parallel_for(0, pass.pixels.batch * pass.pixels.rows(), 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(pass, make_target);
    for (int64_t index = begin; index < end; ++index) worker.task(index);
  });
}

template void run<float>(const ErrorPass&, const MakeTarget<float>&);
template void run<double>(const ErrorPass&, const MakeTarget<double>&);

}  // namespace spectralx::cpu
