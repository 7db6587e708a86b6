// The pass of errors.h. A task is a row of cells of one image; every cell's sum is its own, so the
// bits of the result are the same for any number of threads.
#include "cpu/torch.h"

#include "cpu/reconstruction/errors.h"

#include <vector>

namespace spectralx::cpu {
namespace {

constexpr int64_t kTile = 64;  // pixels whose bands are brought side by side at a time

template <typename T>
struct Worker {
  const ErrorPass& pass;
  const Pixels& pixels = pass.pixels;
  const RowKernels<T>& kernels = row_kernels<T>();
  Reader<T> prediction{pass.prediction};
  Writer<T> gradient{pass.gradient};
  const double* weight = pass.weight.defined() ? pass.weight.const_data_ptr<double>() : nullptr;
  double* errors = pass.errors.defined() ? pass.errors.mutable_data_ptr<double>() : nullptr;
  std::unique_ptr<Target<T>> target;
  std::vector<T> planar, turned, predicted, out;

  Worker(const ErrorPass& pass_, const MakeTarget<T>& make_target)
      : pass(pass_), target(make_target()) {
    const int64_t run = pixels.layout == Layout::kPlanar ? pixels.cell_width
                                                         : kTile * pixels.bands;
    for (std::vector<T>* buffer : {&planar, &turned, &predicted, &out}) buffer->resize(run);
  }

  void task(int64_t index) {
    const int64_t image = index / pixels.rows(), row = index % pixels.rows();
    const int64_t begin = row * pixels.cell_height;
    const int64_t end = std::min(begin + pixels.cell_height, pixels.height);
    const int64_t first = index * pixels.columns();  // cell
    target->open(image, begin, end);
    for (int64_t cell = 0; cell < pixels.columns() && errors; ++cell) errors[first + cell] = 0;
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t cell = 0; cell < pixels.columns(); ++cell) {
        const double share = weight ? weight[first + cell] : 1.0;
        const double sum = pixels.layout == Layout::kPlanar ? planes(image, y, cell, share)
                                                            : bands(image, y, cell, share);
        if (errors) errors[first + cell] += sum;
      }
    }
  }

  // A row of a cell, band after band.
  double planes(int64_t image, int64_t y, int64_t cell, double share) {
    double sum = 0;
    const int64_t n = pixels.cell_width, x = cell * n;
    for (int64_t band = 0; band < pixels.bands; ++band) {
      const int64_t at = pixels.at(image, band, y, x, cell);
      sum += share == 0 ? skip(at, n)
                        : compare(at, n, target->run(band, y, x, n, planar.data()), share);
    }
    return sum;
  }

  // A row of a cell, all bands of kTile pixels at once.
  double bands(int64_t image, int64_t y, int64_t cell, double share) {
    double sum = 0;
    const int64_t left = cell * pixels.cell_width, right = left + pixels.cell_width;
    for (int64_t x = left; x < right; x += kTile) {
      const int64_t n = std::min(kTile, right - x), at = pixels.at(image, 0, y, x, cell);
      if (share == 0) {
        skip(at, n * pixels.bands);
        continue;
      }
      for (int64_t band = 0; band < pixels.bands; ++band) {
        T* to = planar.data() + band * n;
        const T* run = target->run(band, y, x, n, to);
        if (run != to) std::copy_n(run, n, to);
      }
      kernels.transpose(planar.data(), pixels.bands, n, n, turned.data());
      sum += compare(at, n * pixels.bands, turned.data(), share);
    }
    return sum;
  }

  double skip(int64_t at, int64_t n) {
    if (gradient.wanted()) gradient.clear(at, n);
    return 0;
  }

  double compare(int64_t at, int64_t n, const T* wanted, double share) {
    const T* p = prediction.read(at, n, predicted.data());
    if (gradient.wanted()) {
      T* to = gradient.place(at, out.data());
      const auto factor = static_cast<T>(share * pass.factor * (pass.absolute ? 1 : 2));
      (pass.absolute ? kernels.sign : kernels.difference)(p, wanted, n, factor, to);
      gradient.flush(at, n, to);
    }
    if (!errors) return 0;
    return static_cast<double>((pass.absolute ? kernels.absolutes : kernels.squares)(p, wanted, n));
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
