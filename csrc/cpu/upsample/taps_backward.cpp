// The backward pass of taps.h.
#include "cpu/torch.h"

#include "cpu/upsample/products.h"
#include "cpu/upsample/taps.h"

namespace spectralx::cpu {
namespace {

using at::Tensor;

constexpr int64_t kGroupRows = 1024;  // pixels of the small maps whose gradient of Z exists at a time

// Input channels [in, in + ins): [ins, taps * O], the latter in the order of the gradient of Z,
// chunks of [taps, channels].
template <typename S, typename A>
Tensor packed_inputs(const Shape& s, const Tensor& weight, int64_t in, int64_t ins) {
  Tensor to = at::empty({ins, s.taps() * s.outs}, weight.options());
  const std::vector<int64_t> taps = tap_offsets(weight);
  for (int64_t i = 0; i < s.chunks(); ++i) {
    line_kernels<S, A>().pack(
        weight.const_data_ptr<S>() + i * kChunk * weight.stride(0) + in * weight.stride(1),
        taps.data(), s.taps(), ins, s.chunk(i), weight.stride(1), weight.stride(0), s.chunk(i),
        to.stride(0), data<S>(to) + i * kChunk * s.taps());
  }
  return to;
}

// Gradient of Z for one line of one image's chunk. grad [B, H', W', O]; dz has `row` elements a
// pixel, of which the chunk's [taps, channels] begin at its place.
template <typename S, typename A>
void line_backward(const Shape& s, const Axis<A>& rows, const Axis<A>& columns, const S* grad,
                   int64_t image, int64_t line, int64_t chunk, std::vector<A>& buffer, int64_t row,
                   S* dz) {
  const auto& kernels = line_kernels<S, A>();
  const int64_t channels = s.chunk(chunk), width = s.columns * channels;
  buffer.resize(s.ky * width);
  Sum<S, A> down(rows.most_terms());
  for (int64_t tap = 0; tap < s.ky; ++tap) {
    down.n = 0;
    const int64_t place = line * s.ky + tap;
    for (int64_t i = rows.first_of_line[place]; i < rows.first_of_line[place + 1]; ++i) {
      const Term<A>& term = rows.by_line[i];
      down.add(grad + (image * s.rows + term.out) * s.columns * s.outs + chunk * kChunk,
               term.weight);
    }
    kernels.weighted_sum(down.sources.data(), down.weights.data(), down.n, s.columns, channels,
                         s.outs, buffer.data() + tap * width);
  }
  Sum<A, A> across(columns.most_terms());
  for (int64_t x = 0; x < s.width; ++x) {
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      across.n = 0;
      const int64_t place = x * s.kx + tap % s.kx;
      for (int64_t i = columns.first_of_line[place]; i < columns.first_of_line[place + 1]; ++i) {
        const Term<A>& term = columns.by_line[i];
        across.add(buffer.data() + tap / s.kx * width + term.out * channels, term.weight);
      }
      kernels.weighted_sum_stored(across.sources.data(), across.weights.data(), across.n, channels,
                                  dz + x * row + tap * channels);
    }
  }
}

template <typename S, typename A>
void backward(const Shape& s, const Axis<A>& rows, const Axis<A>& columns, const S* grad,
              const Tensor& x, const Tensor& weight, const Tensor& dx, const Tensor& dweight) {
  const int64_t row = s.taps() * s.outs, lines = s.batch * s.height;
  const int64_t group = std::max<int64_t>(kGroupRows / s.width, 1);
  const int64_t blocks = (s.channels + kChunk - 1) / kChunk;
  for (int64_t begin = 0; begin < lines; begin += group) {
    const int64_t count = std::min(group, lines - begin);
    Tensor dz = at::empty({count * s.width, row}, weight.options());
    at::parallel_for(0, count * s.chunks(), 4, [&](int64_t first, int64_t last) {
      std::vector<A> buffer;
      for (int64_t task = first; task < last; ++task) {
        const int64_t chunk = task / count, line = begin + task % count;
        line_backward(s, rows, columns, grad, line / s.height, line % s.height, chunk, buffer, row,
                      data<S>(dz) + task % count * s.width * row + chunk * kChunk * s.taps());
      }
    });
    if (dx.defined()) {
      Tensor part = dx.narrow(0, begin * s.width, count * s.width);
      over_products(blocks, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t ins = std::min(kChunk, s.channels - block * kChunk);
          part.narrow(1, block * kChunk, ins)
              .copy_(product(dz, packed_inputs<S, A>(s, weight, block * kChunk, ins)));
        }
      });
    }
    if (dweight.defined()) {
      const Tensor across = x.narrow(0, begin * s.width, count * s.width).t().contiguous();
      over_products(s.chunks(), [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const int64_t outs = s.chunk(chunk), size = outs * s.taps();
          Tensor part = at::empty({size, across.size(1)}, dz.options());
          line_kernels<S, A>().transpose(dz.const_data_ptr<S>() + chunk * kChunk * s.taps(),
                                         across.size(1), size, row, across.size(1), data<S>(part));
          const Tensor found = product(across, part);
          // [C, ky, kx, outs] -> [outs, C, ky, kx]
          line_kernels<S, A>().unpack(found.const_data_ptr<S>(), tap_offsets(dweight).data(),
                                      s.taps(), outs, s.channels, dweight.stride(0),
                                      dweight.stride(1), begin > 0,
                                      data<S>(dweight) + chunk * kChunk * dweight.stride(0));
        }
      });
    }
  }
}

// Rows first, then the rows in order.
template <typename S, typename A>
Tensor sums_of(const Shape& s, const S* grad, const at::TensorOptions& options) {
  const auto& kernels = line_kernels<S, A>();
  Tensor partial = at::zeros({s.batch * s.rows, s.outs}, options);
  at::parallel_for(0, s.batch * s.rows, 8, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels.add_pixels(grad + row * s.columns * s.outs, s.columns, s.outs, s.outs,
                         data<A>(partial) + row * s.outs);
    }
  });
  Tensor total = at::zeros({s.outs}, options);
  for (int64_t row = 0; row < s.batch * s.rows; ++row) {
    for (int64_t o = 0; o < s.outs; ++o) data<A>(total)[o] += data<A>(partial)[row * s.outs + o];
  }
  return total;
}

}  // namespace

void taps_backward(const Shape& s, const Placement& placement, const Tensor& grad, const Tensor& x,
                   const Tensor& weight, const Tensor& dx, const Tensor& dweight) {
  SPECTRALX_DISPATCH(x.scalar_type(), [&] {
    backward<S, A>(s, placement.axis<A>(s, 0), placement.axis<A>(s, 1), grad.const_data_ptr<S>(), x,
                   weight, dx, dweight);
  });
}

Tensor channel_sums(const Shape& s, const Tensor& grad) {
  const auto options = grad.options().dtype(sum_type(grad.scalar_type()));
  Tensor total;
  SPECTRALX_DISPATCH(grad.scalar_type(),
                     [&] { total = sums_of<S, A>(s, grad.const_data_ptr<S>(), options); });
  return total;
}

}  // namespace spectralx::cpu
