// 3 x 3 convolutions with a border of one zero, by F(2 x 2, 3 x 3) (Winograd 1980; Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016).
//
// Four outputs of a 2 x 2 tile take the 4 x 4 inputs around it. With the tile's 16 inputs, the kernel's
// 9 weights and the 4 outputs transformed to 16 places (B^T d B, G g G^T, A^T m A), a convolution is
// 16 products of [tiles, C] and [C, O]: 16 multiplications a tile instead of 36. Groups of rows of
// tiles are the tasks, so that a group's transformed tiles stay in the cache; groups depend on shapes
// alone, and the gradient of the weight adds them in order.
#include "cpu/torch.h"

#include "cpu/upsample/winograd.h"

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/upsample/products.h"

namespace spectralx::cpu {
namespace {

using at::Tensor;

constexpr int64_t kPlaces = 16;
constexpr int64_t kTiles = 112;  // of a group, about

const LineKernels<float, float>& kernels() { return line_kernels<float, float>(); }

struct Tiles {
  int64_t batch, rows, columns, channels;  // of the map
  int64_t down, across;                    // tiles of an image
  int64_t lines, groups;                   // rows of tiles of a group; groups

  explicit Tiles(const Tensor& map)
      : batch(map.size(0)),
        rows(map.size(2)),
        columns(map.size(3)),
        channels(map.size(1)),
        down((rows + 1) / 2),
        across((columns + 1) / 2),
        lines(std::max<int64_t>(kTiles / across, 1)),
        groups((batch * down + lines - 1) / lines) {}

  int64_t first(int64_t group) const { return group * lines; }
  int64_t last(int64_t group) const { return std::min((group + 1) * lines, batch * down); }
  int64_t tiles(int64_t group) const { return (last(group) - first(group)) * across; }

  // use(index in the group, image, first row, first column of its outputs)
  template <typename Use>
  void each(int64_t group, const Use& use) const {
    int64_t index = 0;
    for (int64_t line = first(group); line < last(group); ++line) {
      for (int64_t x = 0; x < across; ++x) use(index++, line / down, line % down * 2, 2 * x);
    }
  }
};

// side x side pixels of a map [rows, columns, C] from (y, x) on, zeros outside: where they lie, or
// copied to `scratch`. Gives their first and the distance from row to row.
std::pair<const float*, int64_t> window(const Tiles& t, const float* image, int64_t y, int64_t x,
                                        int64_t side, std::vector<float>& scratch) {
  const int64_t c = t.channels;
  if (y >= 0 && x >= 0 && y + side <= t.rows && x + side <= t.columns) {
    return {image + (y * t.columns + x) * c, t.columns * c};
  }
  scratch.assign(side * side * c, 0.f);
  for (int64_t i = std::max<int64_t>(-y, 0); i < std::min(side, t.rows - y); ++i) {
    for (int64_t j = std::max<int64_t>(-x, 0); j < std::min(side, t.columns - x); ++j) {
      const float* from = image + ((y + i) * t.columns + x + j) * c;
      std::copy(from, from + c, scratch.data() + (i * side + j) * c);
    }
  }
  return {scratch.data(), side * c};
}

// The group's inputs, or what its outputs' gradients become: [16, tiles, C].
Tensor transformed(const Tiles& t, const Tensor& map, int64_t group, bool outputs) {
  const int64_t tiles = t.tiles(group), area = t.rows * t.columns * t.channels;
  Tensor to = at::empty({kPlaces, tiles, t.channels}, map.options());
  std::vector<float> scratch;
  t.each(group, [&](int64_t tile, int64_t image, int64_t y, int64_t x) {
    const float* from = map.const_data_ptr<float>() + image * area;
    const int64_t back = outputs ? 0 : 1;
    const auto [at, row] = window(t, from, y - back, x - back, outputs ? 2 : 4, scratch);
    const auto run = outputs ? kernels().winograd_outputs : kernels().winograd_inputs;
    run(at, row, t.channels, tiles * t.channels, data<float>(to) + tile * t.channels);
  });
  return to;
}

// G (x) G, [16, 9].
Tensor weights_transform() {
  static const Tensor made = [] {
    const Tensor g = at::tensor({1., 0., 0., .5, .5, .5, .5, -.5, .5, 0., 0., 1.}, at::kFloat)
                         .view({4, 3});
    return (g.view({4, 1, 3, 1}) * g.view({1, 4, 1, 3})).reshape({16, 9});
  }();
  return made;
}

// [16, outs, ins] of weight [outs, ins, 3, 3] in any strides.
Tensor transformed_weight(const Tensor& weight) {
  const Tensor taps = weight.permute({2, 3, 0, 1}).reshape({9, -1});
  return at::mm(weights_transform(), taps).view({kPlaces, weight.size(0), weight.size(1)});
}

// The convolution of x, channels last, with a kernel that is transformed already.
Tensor convolution(const Tensor& x, const Tensor& kernel) {
  const Tiles t(x);
  const int64_t outs = kernel.size(1);
  Tensor out = at::empty({t.batch, outs, t.rows, t.columns}, x.options(), kChannelsLast);
  over_products(t.groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const Tensor tiles = transformed(t, x, group, false);
      std::array<Tensor, kPlaces> products;
      std::array<const float*, kPlaces> from;
      for (int64_t place = 0; place < kPlaces; ++place) {
        products[place] = product(tiles.select(0, place), kernel.select(0, place));
        from[place] = products[place].const_data_ptr<float>();
      }
      t.each(group, [&](int64_t tile, int64_t image, int64_t y, int64_t x_) {
        float* to = data<float>(out) + ((image * t.rows + y) * t.columns + x_) * outs;
        kernels().winograd_finish(from.data(), tile * outs, outs, std::min<int64_t>(2, t.rows - y),
                                  std::min<int64_t>(2, t.columns - x_), t.columns * outs, to);
      });
    }
  });
  return out;
}

}  // namespace

bool winograd_takes(const Tensor& x, const Tensor& weight, at::IntArrayRef padding) {
  const bool kernel = weight.size(2) == 3 && weight.size(3) == 3 && padding[0] == 1 && padding[1] == 1;
  return kernel && x.scalar_type() == at::kFloat && weight.size(0) >= 64 && weight.size(1) >= 64 &&
         x.size(0) * x.size(2) * x.size(3) >= 1024;
}

Tensor winograd_forward(const Tensor& x, const Tensor& weight) {
  return convolution(channels_last<float, float>(x), transformed_weight(weight));
}

Tensor winograd_input_gradient(const Tensor& grad, const Tensor& weight) {
  const Tensor turned = weight.transpose(0, 1).flip({2, 3});
  return convolution(channels_last<float, float>(grad), transformed_weight(turned));
}

Tensor winograd_weight_gradient(const Tensor& grad, const Tensor& x) {
  const Tensor map = channels_last<float, float>(x), dy = channels_last<float, float>(grad);
  const Tiles ins(map), outs(dy);
  const Tensor total = at::zeros({kPlaces, outs.channels, ins.channels}, x.options());
  // Groups of both threads' worth at a time: tiles by group, products by place, each in order.
  constexpr int64_t kAtOnce = 8;
  for (int64_t first = 0; first < ins.groups; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, ins.groups - first);
    std::vector<Tensor> inputs(count), grads(count);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        inputs[i] = transformed(ins, map, first + i, false);
        grads[i] = transformed(outs, dy, first + i, true);
      }
    });
    over_products(kPlaces, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin; place < end; ++place) {
        Tensor sum = total.select(0, place);
        for (int64_t i = 0; i < count; ++i) {
          sum.addmm_(grads[i].select(0, place).t(), inputs[i].select(0, place));
        }
      }
    });
  }
  const Tensor taps = at::mm(weights_transform().t(), total.view({kPlaces, -1}));
  return taps.view({3, 3, outs.channels, ins.channels}).permute({2, 3, 0, 1});
}

}  // namespace spectralx::cpu
