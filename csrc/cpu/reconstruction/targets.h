// What predictions are compared with, made a run of one band and row at a time and never stored.
//
// A target is of one image and one thread. `open` is called for an image and a row of cells before
// its runs are asked for.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "cpu/reconstruction/streams.h"
#include "cpu/upsample/columns.h"

namespace spectralx::cpu {

constexpr double kPatchNormEpsilon = 1e-6;  // PATCH_NORM_EPS in reference.py

// Images [B, C, H, W], read a piece of a row at a time.
template <typename T>
struct Image {
  Reader<T> reader;
  int64_t bands, height, width;

  explicit Image(const at::Tensor& images)
      : reader(images), bands(images.size(1)), height(images.size(2)), width(images.size(3)) {}

  const T* row(int64_t image, int64_t band, int64_t y, int64_t x, int64_t n, T* buffer) const {
    return reader.read(((image * bands + band) * height + y) * width + x, n, buffer);
  }

  // All bands of n pixels side by side, [n, bands]; `buffer` has room for as many.
  void line(int64_t image, int64_t y, int64_t x, int64_t n, T* buffer, T* to) const {
    const T* from = row(image, 0, y, x, n, buffer);
    if (from == buffer) {
      for (int64_t band = 1; band < bands; ++band) row(image, band, y, x, n, buffer + band * n);
    }
    row_kernels<T>().interleave(from, bands, n, from == buffer ? n : height * width, to);
  }
};

// `run` is asked for a band of a row at a time, or `line` for all bands side by side, never both.
template <typename T>
struct Target {
  const RowKernels<T>& kernels = row_kernels<T>();
  int64_t bands, image = -1;

  explicit Target(int64_t bands_) : bands(bands_) {}
  virtual ~Target() = default;
  // Rows [begin, end) of `image_` are next.
  virtual void open(int64_t image_, int64_t /*begin*/, int64_t /*end*/) { image = image_; }
  // Values [x, x + n) of a row; `buffer` has room for as many, for those that lie nowhere.
  virtual Lines<T> run(int64_t band, int64_t y, int64_t x, int64_t n, T* buffer) = 0;
  // Pixels [x, x + n) of a row, [n, bands]; the same.
  virtual Lines<T> line(int64_t y, int64_t x, int64_t n, T* buffer) = 0;

 protected:
  T* room(int64_t size) {
    if (static_cast<int64_t>(room_.size()) < size) room_.resize(size);
    return room_.data();
  }

 private:
  std::vector<T> room_;
};

// The image itself; or every patch of it, brought to mean 0 and variance 1.
template <typename T>
struct PatchTarget : Target<T> {
  Image<T> from;
  int64_t patch;
  bool normalize;
  std::vector<T> mean, scale;  // of the patches of this row

  PatchTarget(const at::Tensor& images, int64_t patch_, bool normalize_)
      : Target<T>(images.size(1)), from(images), patch(patch_), normalize(normalize_),
        mean(images.size(3) / patch_), scale(mean.size()) {}

  void open(int64_t image_, int64_t begin, int64_t end) override {
    this->image = image_;
    if (!normalize) return;
    const int64_t length = patch * patch * from.bands;
    std::vector<T> buffer(patch);
    const auto over_patch = [&](size_t cell, auto add) {
      double total = 0;
      for (int64_t band = 0; band < from.bands; ++band) {
        for (int64_t y = begin; y < end; ++y) {
          total += static_cast<double>(
              add(from.row(image_, band, y, static_cast<int64_t>(cell) * patch, patch,
                           buffer.data())));
        }
      }
      return total;
    };
    const RowKernels<T>& k = this->kernels;
    for (size_t cell = 0; cell < mean.size(); ++cell) {
      const double middle =
          over_patch(cell, [&](const T* x) { return k.sum(x, patch); }) / static_cast<double>(length);
      mean[cell] = static_cast<T>(middle);
      const double spread = over_patch(
          cell, [&](const T* x) { return k.centred(x, patch, mean[cell]); });
      const double variance = spread / static_cast<double>(std::max<int64_t>(length - 1, 1));
      scale[cell] = static_cast<T>(1 / std::sqrt(variance + kPatchNormEpsilon));
    }
  }

  Lines<T> run(int64_t band, int64_t y, int64_t x, int64_t n, T* buffer) override {
    const T* row = from.row(this->image, band, y, x, n, buffer);
    return {normalize ? normalized(row, x, n, 1, buffer) : row};
  }

  Lines<T> line(int64_t y, int64_t x, int64_t n, T* buffer) override {
    from.line(this->image, y, x, n, this->room(n * this->bands), buffer);
    return {normalize ? normalized(buffer, x, n, this->bands, buffer) : buffer};
  }

 private:
  // Pixels [x, x + n) of `channels` values.
  const T* normalized(const T* values, int64_t x, int64_t n, int64_t channels, T* to) const {
    for (int64_t i = 0; i < n;) {
      const int64_t cell = (x + i) / patch, end = std::min((cell + 1) * patch - x, n);
      this->kernels.normalize(values + i * channels, (end - i) * channels, mean[cell], scale[cell],
                              to + i * channels);
      i = end;
    }
    return to;
  }
};

// Rows of a map [B, C, h, w] made longer, two kept: neighbours, or the same twice.
template <typename T>
class WideRows {
 public:
  // Bilinearly.
  WideRows(const at::Tensor& map, const Axis& axis)
      : from_(map), width_(static_cast<int64_t>(axis.first.size())), copies_(axis.step == 0) {
    for (int64_t i = 0; i < width_; ++i) {
      first_.push_back(static_cast<int32_t>(axis.first[i]));
      second_.push_back(static_cast<int32_t>(std::min(axis.first[i] + axis.step, axis.length - 1)));
      first_weight_.push_back(static_cast<T>(1.0 - axis.weight[i]));
      second_weight_.push_back(static_cast<T>(axis.weight[i]));
    }
  }
  // By taking the columns of `index`.
  WideRows(const at::Tensor& map, std::vector<int32_t> index)
      : from_(map), width_(static_cast<int64_t>(index.size())), copies_(true),
        first_(std::move(index)) {}

  void forget() { loaded_[0] = loaded_[1] = {-1, -1}; }

  // A row of a band, and one of all bands side by side, [width, C].
  const T* row(int64_t image, int64_t band, int64_t y) {
    return kept(band, y, 1, [&](T* to) {
      const T* source = from_.row(image, band, y, 0, from_.width, source_.data());
      if (width_ == 2 * from_.width) {
        (copies_ ? kernels_.take_twice : kernels_.interpolate_twice)(source, from_.width, to);
      } else {
        widen(source, 1, to);
      }
    });
  }
  const T* line(int64_t image, int64_t y) {
    return kept(0, y, from_.bands, [&](T* to) {
      buffer_.resize(from_.width * from_.bands);
      from_.line(image, y, 0, from_.width, buffer_.data(), source_.data());
      widen(source_.data(), from_.bands, to);
    });
  }

 private:
  template <typename Fill>
  const T* kept(int64_t band, int64_t y, int64_t channels, const Fill& fill) {
    const int64_t slot = y % 2, length = width_ * channels + kSpill;
    if (rows_.empty()) {
      rows_.resize(2 * length);
      source_.resize(from_.width * channels + kSpill);
    }
    T* to = rows_.data() + slot * length;
    if (loaded_[slot] != std::pair(band, y)) fill(to);
    loaded_[slot] = {band, y};
    return to;
  }

  void widen(const T* source, int64_t channels, T* to) const {
    if (copies_) {
      kernels_.take(source, first_.data(), width_, channels, to);
    } else {
      kernels_.interpolate(source, first_.data(), second_.data(), first_weight_.data(),
                           second_weight_.data(), width_, channels, to);
    }
  }

  const RowKernels<T>& kernels_ = row_kernels<T>();
  Image<T> from_;
  int64_t width_;
  bool copies_;
  std::vector<int32_t> first_, second_;
  std::vector<T> first_weight_, second_weight_, buffer_, source_, rows_;
  std::pair<int64_t, int64_t> loaded_[2] = {{-1, -1}, {-1, -1}};  // band, row
};

// A map resized bilinearly, align_corners False.
template <typename T>
struct ResizedTarget : Target<T> {
  Axis rows;
  WideRows<T> wide;

  ResizedTarget(const at::Tensor& map, int64_t height, int64_t width)
      : Target<T>(map.size(1)), rows(map.size(2), height, false),
        wide(map, Axis(map.size(3), width, false)) {}

  void open(int64_t image_, int64_t, int64_t) override {
    this->image = image_;
    wide.forget();
  }

  Lines<T> run(int64_t band, int64_t y, int64_t x, int64_t, T*) override {
    return mixed(y, [&](int64_t at) { return wide.row(this->image, band, at) + x; });
  }

  Lines<T> line(int64_t y, int64_t x, int64_t, T*) override {
    return mixed(y, [&](int64_t at) { return wide.line(this->image, at) + x * this->bands; });
  }

 private:
  template <typename Row>
  Lines<T> mixed(int64_t y, const Row& row) const {
    const T* top = row(rows.first[y]);
    if (rows.step == 0) return {top};
    const T* bottom = row(std::min(rows.first[y] + rows.step, rows.length - 1));
    const double weight = rows.weight[y];
    return {nullptr, top, bottom, static_cast<T>(1.0 - weight), static_cast<T>(weight)};
  }
};

// Where position i of a row or column of `size` lies among `length`, by nearest neighbour; in float,
// as torch.nn.functional.interpolate does.
inline std::vector<int32_t> nearest(int64_t length, int64_t size) {
  const float scale = static_cast<float>(length) / static_cast<float>(size);
  std::vector<int32_t> index(size);
  for (int64_t i = 0; i < size; ++i) {
    const auto at = static_cast<int64_t>(std::floor(static_cast<float>(i) * scale));
    index[i] = static_cast<int32_t>(std::min(at, length - 1));
  }
  return index;
}

// Along one axis: `length` values repeated to `full` by nearest neighbour, then averaged over `size`
// windows. Window i is the sum of weights[first[i] ...] times the values from `source[i]` on.
struct Windows {
  std::vector<int64_t> source, first;  // [size], [size + 1]
  std::vector<double> weights;
  bool copies;  // window i is value i

  Windows(int64_t length, int64_t full, int64_t size) : first{0}, copies(length == size) {
    const std::vector<int32_t> index = nearest(length, full);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t begin = i * full / size, end = ((i + 1) * full + size - 1) / size;
      source.push_back(index[begin]);
      weights.resize(weights.size() + index[end - 1] - index[begin] + 1, 0.0);
      for (int64_t j = begin; j < end; ++j) {
        weights[first.back() + index[j] - index[begin]] += 1.0 / static_cast<double>(end - begin);
      }
      first.push_back(static_cast<int64_t>(weights.size()));
      copies = copies && index[begin] == i && index[end - 1] == i;
    }
  }
};

// The image, repeated to full_height x full_width, averaged over areas to height x width.
template <typename T>
struct AverageTarget : Target<T> {
  Image<T> from;
  Windows rows, columns;
  std::vector<T> source, sum;  // of whole source rows

  AverageTarget(const at::Tensor& images, int64_t full_height, int64_t full_width, int64_t height,
                int64_t width)
      : Target<T>(images.size(1)), from(images), rows(images.size(2), full_height, height),
        columns(images.size(3), full_width, width), source(from.width), sum(from.width) {}

  Lines<T> run(int64_t band, int64_t y, int64_t x, int64_t n, T* buffer) override {
    return {values(band, y, x, n, buffer)};
  }

  Lines<T> line(int64_t y, int64_t x, int64_t n, T* buffer) override {
    T* planes = this->room(n * this->bands);
    if (copies()) {
      from.line(this->image, y, x, n, planes, buffer);
    } else {
      for (int64_t band = 0; band < this->bands; ++band) {
        values(band, y, x, n, planes + band * n);
      }
      this->kernels.interleave(planes, this->bands, n, n, buffer);
    }
    return {buffer};
  }

  bool copies() const { return rows.copies && columns.copies; }

  // In place, or in `buffer`.
  const T* values(int64_t band, int64_t y, int64_t x, int64_t n, T* buffer) {
    if (copies()) return from.row(this->image, band, y, x, n, buffer);
    const int64_t begin = columns.source[x], last = x + n - 1;
    const int64_t end = columns.source[last] + columns.first[last + 1] - columns.first[last];
    std::fill_n(sum.begin(), end - begin, T(0));
    for (int64_t i = rows.first[y]; i < rows.first[y + 1]; ++i) {
      const T* row = from.row(this->image, band, rows.source[y] + i - rows.first[y], begin,
                              end - begin, source.data());
      this->kernels.add(row, end - begin, static_cast<T>(rows.weights[i]), sum.data());
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = columns.source[x + j] - begin;
      T value = 0;
      for (int64_t i = columns.first[x + j]; i < columns.first[x + j + 1]; ++i) {
        value += static_cast<T>(columns.weights[i]) * sum[at + i - columns.first[x + j]];
      }
      buffer[j] = value;
    }
    return buffer;
  }
};

// The image, repeated to height x width, less `base` resized bilinearly.
template <typename T>
struct DetailTarget : Target<T> {
  std::vector<int32_t> rows;
  WideRows<T> wide;
  ResizedTarget<T> base;

  DetailTarget(const at::Tensor& images, const at::Tensor& base_, int64_t height, int64_t width)
      : Target<T>(images.size(1)), rows(nearest(images.size(2), height)),
        wide(images, nearest(images.size(3), width)), base(base_, height, width) {}

  void open(int64_t image_, int64_t begin, int64_t end) override {
    this->image = image_;
    wide.forget();
    base.open(image_, begin, end);
  }

  Lines<T> run(int64_t band, int64_t y, int64_t x, int64_t n, T* buffer) override {
    return less(wide.row(this->image, band, rows[y]) + x, base.run(band, y, x, n, buffer));
  }

  Lines<T> line(int64_t y, int64_t x, int64_t n, T* buffer) override {
    const T* sharp = wide.line(this->image, rows[y]) + x * this->bands;
    return less(sharp, base.line(y, x, n, buffer));
  }

 private:
  static Lines<T> less(const T* sharp, Lines<T> smooth) {
    if (smooth.a == nullptr) return {sharp, smooth.x, smooth.x, T(0.5), T(0.5)};  // x, also if inf
    smooth.x = sharp;
    return smooth;
  }
};

}  // namespace spectralx::cpu
