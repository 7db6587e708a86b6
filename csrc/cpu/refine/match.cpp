// spectralx::match_argmax on the CPU. Maths: spectralx_kernels/refine/README.md.
//
// A task takes panels of 32 queries of one image, one after the other, against all keys: the scores
// [keys, 32] of a panel stay in the cache, first for the sums over the keys, then for the comparison
// with the best query so far. Beyond kKeys keys they come in chunks, and are computed a second time
// for the comparison; the scores of all queries never exist. Comparisons are exact, so the number of
// tasks an image is cut into changes no bit.
#include "cpu/torch.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/refine/kernels.h"
#include "cpu/refine/types.h"

namespace {

using at::Tensor;
using namespace spectralx::cpu;

constexpr int64_t kKeys = 2048;  // of a chunk: 256 kB of scores

template <typename W>
struct Best {
  W* value;        // [keys], null where the image is one task
  int64_t* query;  // [keys]
};

// log(sum over keys of exp(score)) of a query.
template <typename W>
W log_of_sum(W largest, W sum) {
  if (std::isnan(sum)) return sum;
  return std::isinf(largest) ? largest : largest + std::log(sum);
}

template <typename Op>
class Worker {
 public:
  using W = Wide<Op>;

  Worker(const Tensor& queries, const Tensor& keys, double scale)
      : queries_(queries), keys_(keys), width_(keys.size(2)), count_(keys.size(1)),
        scale_(static_cast<W>(scale)) {
    const auto wide = at::TensorOptions(c10::CppTypeToScalarType<W>::value);
    panel_ = at::empty({width_ * kPanel}, queries.options());
    scores_ = at::empty({std::min(kKeys, count_) * kPanel}, wide);
    best_ = at::empty({count_ * kLanes}, wide);
    index_ = at::empty({count_ * kLanes}, at::kInt);
  }

  // Queries [first, last) of an image, `first` a multiple of 32.
  void run(int64_t image, int64_t first, int64_t last, Best<W> found) {
    W* best = best_.mutable_data_ptr<W>();
    int32_t* index = index_.mutable_data_ptr<int32_t>();
    std::fill_n(best, count_ * kLanes, -std::numeric_limits<W>::infinity());
    for (int64_t i = 0; i < count_ * kLanes; ++i) {
      index[i] = static_cast<int32_t>(first + i % kLanes);
    }
    const Op* rows = queries_.const_data_ptr<Op>() + image * queries_.size(1) * width_;
    const Op* keys = keys_.const_data_ptr<Op>() + image * count_ * width_;
    W* scores = scores_.mutable_data_ptr<W>();
    Op* panel = panel_.mutable_data_ptr<Op>();
    for (int64_t q = first; q < last; q += kPanel) {
      const int64_t live = std::min(kPanel, last - q), lanes = live <= kLanes ? kLanes : kPanel;
      kernels_.pack(rows + q * width_, live, width_, width_, panel);
      alignas(64) W largest[kPanel], sum[kPanel], log_sum[kPanel];
      std::fill_n(largest, kPanel, -std::numeric_limits<W>::infinity());
      std::fill_n(sum, kPanel, W(0));
      const auto score = [&](int64_t key) {
        const int64_t n = std::min(kKeys, count_ - key);
        product(n, lanes, width_, keys + key * width_, width_, panel, kPanel, scores, kPanel, false);
        return n;
      };
      for (int64_t key = 0; key < count_; key += kKeys) {
        kernels_.add_keys(scores, score(key), lanes, scale_, largest, sum);
      }
      for (int64_t n = 0; n < lanes; ++n) log_sum[n] = log_of_sum(largest[n], sum[n]);
      // A query's only key has all of its weight: all queries tie, whatever a fused multiplication
      // would leave of a score less itself.
      if (count_ == 1) {
        for (int64_t n = 0; n < lanes; ++n) {
          if (std::isfinite(log_sum[n])) scores[n] = log_sum[n] = W(0);
        }
      }
      for (int64_t key = 0; key < count_; key += kKeys) {
        const int64_t n = count_ > kKeys ? score(key) : count_;
        kernels_.choose(scores, n, scale_, log_sum, q, live, best + key * kLanes,
                        index + key * kLanes);
      }
    }
    kernels_.reduce(best, index, count_, found.value, found.query);
  }

 private:
  const RefineKernels<Op>& kernels_ = refine_kernels<Op>();
  const Tensor &queries_, &keys_;
  int64_t width_, count_;
  W scale_;
  Tensor panel_, scores_, best_, index_;
};

template <typename Op>
void match(const Tensor& queries, const Tensor& keys, double scale, const Tensor& out) {
  using W = Wide<Op>;
  const int64_t batch = keys.size(0), count = keys.size(1), rows = queries.size(1);
  const int64_t panels = (rows + kPanel - 1) / kPanel, threads = at::get_num_threads();
  // Parts of an image, where there are fewer images than threads.
  const int64_t wanted = std::min(panels, (threads + batch - 1) / batch);
  const int64_t length = (panels + wanted - 1) / wanted, parts = (panels + length - 1) / length;
  const bool whole = parts == 1;
  const Tensor queries_found = whole ? out : at::empty({batch, parts, count}, out.options());
  const Tensor values = whole ? Tensor()
                              : at::empty({batch, parts, count},
                                          at::TensorOptions(c10::CppTypeToScalarType<W>::value));
  at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    Worker<Op> worker(queries, keys, scale);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * length * kPanel;
      worker.run(task / parts, first, std::min(rows, first + length * kPanel),
                 {whole ? nullptr : values.mutable_data_ptr<W>() + task * count,
                  queries_found.mutable_data_ptr<int64_t>() + task * count});
    }
    end_products();
  });
  if (whole) return;
  const W* value = values.const_data_ptr<W>();
  const int64_t* query = queries_found.const_data_ptr<int64_t>();
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t key = 0; key < count; ++key) {
      int64_t best = image * parts * count + key;
      for (int64_t part = 1; part < parts; ++part) {
        const int64_t at = (image * parts + part) * count + key;
        if (comes_before(value[at], query[at], value[best], query[best])) best = at;
      }
      to[image * count + key] = query[best];
    }
  }
}

Tensor match_argmax(const Tensor& queries, const Tensor& keys, double scale) {
  TORCH_CHECK_VALUE(queries.dim() == 3 && queries.size(1) > 0, "queries: got shape ",
                    queries.sizes(), ", expected [batch, at least 1, width]");
  TORCH_CHECK_VALUE(keys.dim() == 3 && keys.size(0) == queries.size(0) &&
                        keys.size(2) == queries.size(2),
                    "keys: got shape ", keys.sizes(), ", expected [", queries.size(0), ", keys, ",
                    queries.size(2), "]");
  TORCH_CHECK_TYPE(keys.scalar_type() == queries.scalar_type(), "keys: got dtype ",
                   keys.scalar_type(), ", expected ", queries.scalar_type(), " as queries");
  TORCH_CHECK_VALUE(queries.size(1) < std::numeric_limits<int32_t>::max() - kPanel,
                    "queries: got ", queries.size(1), " rows, expected fewer than 2^31 - 32");
  const auto options = keys.options().dtype(at::kLong);
  // Without a width all scores are equal.
  if (keys.numel() == 0) return at::zeros({keys.size(0), keys.size(1)}, options);
  auto type = kernel_type(queries.scalar_type());
  // Products of bfloat16 take pairs of their inner dimension.
  if (type == at::kBFloat16 && queries.size(2) % 2 != 0) type = at::kFloat;
  const Tensor out = at::empty({keys.size(0), keys.size(1)}, options);
  with_kernel_type(type, [&](auto tag) {
    match<decltype(tag)>(queries.to(type).contiguous(), keys.to(type).contiguous(), scale, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) { m.impl("match_argmax", &match_argmax); }
