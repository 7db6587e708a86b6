// spectralx::random_masking, gather_tokens and restore_tokens on the CPU.
#include "cpu/torch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/reconstruction/rows.h"

namespace {

using at::Tensor;
using spectralx::cpu::accumulation_type;

using Grads = c10::List<std::optional<Tensor>>;
using Wanted = c10::List<bool>;

// An integer in the order of the noise: -0 as 0, NaN last.
int32_t key_of(float value) {
  if (value != value) return INT32_MAX;
  const auto bits = std::bit_cast<int32_t>(value + 0.0f);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}
int64_t key_of(double value) {
  if (value != value) return INT64_MAX;
  const auto bits = std::bit_cast<int64_t>(value + 0.0);
  return bits < 0 ? bits ^ INT64_MAX : bits;
}

// Up to here the rank of a token is how many are smaller, counted; beyond, they are sorted.
constexpr int64_t kCounted = 512;

template <typename T, typename K>
void ranks_of(const T* noise, int64_t tokens, std::vector<K>& keys, std::vector<int64_t>& order,
              int64_t* ranks) {
  for (int64_t i = 0; i < tokens; ++i) keys[i] = key_of(noise[i]);
  if (tokens > kCounted) {
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
    for (int64_t rank = 0; rank < tokens; ++rank) ranks[order[rank]] = rank;
    return;
  }
  for (int64_t i = 0; i < tokens; ++i) {
    const K key = keys[i];
    K below = 0;  // as wide as the keys, so that counting takes the same lanes
#pragma omp simd reduction(+ : below)
    for (int64_t j = 0; j < i; ++j) below += keys[j] <= key;
#pragma omp simd reduction(+ : below)
    for (int64_t j = i + 1; j < tokens; ++j) below += keys[j] < key;
    ranks[i] = below;
  }
}

template <typename T, typename K>
void mask_images(const Tensor& noise, int64_t keep, const Tensor& kept, const Tensor& mask,
                 const Tensor& restore) {
  const int64_t tokens = noise.size(1);
  const T* from = noise.const_data_ptr<T>();
  int64_t *ids = kept.mutable_data_ptr<int64_t>(), *ranks = restore.mutable_data_ptr<int64_t>();
  bool* masked = mask.mutable_data_ptr<bool>();
  at::parallel_for(0, noise.size(0), 8, [&](int64_t begin, int64_t end) {
    std::vector<K> keys(tokens);
    std::vector<int64_t> order(tokens > kCounted ? tokens : 0);
    for (int64_t image = begin; image < end; ++image) {
      const int64_t at = image * tokens;
      ranks_of(from + at, tokens, keys, order, ranks + at);
      for (int64_t i = at; i < at + tokens; ++i) {
        masked[i] = ranks[i] >= keep;
        if (ranks[i] < keep) ids[image * keep + ranks[i]] = i - at;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> random_masking(const Tensor& noise, int64_t keep) {
  TORCH_CHECK_VALUE(noise.dim() == 2, "noise: got shape ", noise.sizes(),
                    ", expected [batch, tokens]");
  const int64_t batch = noise.size(0), tokens = noise.size(1);
  TORCH_CHECK_VALUE(keep >= 0 && keep <= tokens, "keep: got ", keep, ", expected 0 to ", tokens);
  const Tensor restore = at::empty({batch, tokens}, noise.options().dtype(at::kLong));
  const Tensor kept = at::empty({batch, keep}, restore.options());
  const Tensor mask = at::empty({batch, tokens}, restore.options().dtype(at::kBool));
  const Tensor wide = noise.to(accumulation_type(noise.scalar_type())).contiguous();
  if (wide.scalar_type() == at::kDouble) {
    mask_images<double, int64_t>(wide, keep, kept, mask, restore);
  } else {
    mask_images<float, int32_t>(wide, keep, kept, mask, restore);
  }
  return {kept, mask, restore};
}

// ---------------------------------------------------------------------------------------------

// Indices [B, n] of rows below `limit`.
Tensor checked(const char* name, const Tensor& ids, int64_t batch, int64_t limit) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == batch && ids.scalar_type() == at::kLong, name,
                    ": got shape ", ids.sizes(), " of ", ids.scalar_type(), ", expected [", batch,
                    ", n] of int64");
  const Tensor dense = ids.contiguous();
  const int64_t* id = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < limit, name, ": got ", id[i], ", expected 0 to ",
                      limit - 1);
  }
  return dense;
}

Tensor gather_tokens(const Tensor& tokens, const Tensor& ids) {
  const Tensor from = tokens.contiguous();
  const int64_t batch = from.size(0), length = from.size(1), width = from.size(2);
  const Tensor index = checked("ids", ids, batch, length);
  const Tensor out = at::empty({batch, index.size(1), width}, tokens.options());
  const size_t row = static_cast<size_t>(width) * from.element_size();
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* id = index.const_data_ptr<int64_t>();
  const int64_t kept = index.size(1);
  at::parallel_for(0, batch * kept, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(to + i * row, source + (i / kept * length + id[i]) * row, row);
    }
  });
  return out;
}

// out[image, ids[image, i]] += rows[image, i], for ids below `length`, in order of i; sums in the
// accumulation type. `rest`: [batch, width] sums of the other rows, not wanted where undefined.
template <typename T>
void scatter(const Tensor& rows, const Tensor& ids, const Tensor& out, const Tensor& rest) {
  const int64_t count = rows.size(1), length = out.size(1), width = rows.size(2);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const T* from = rows.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const auto add = spectralx::cpu::row_kernels<T>().add;
  at::parallel_for(0, rows.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t i = image * count; i < (image + 1) * count; ++i) {
        if (id[i] < length) {
          add(from + i * width, width, T(1), to + (image * length + id[i]) * width);
        } else if (rest.defined()) {
          add(from + i * width, width, T(1), rest.mutable_data_ptr<T>() + image * width);
        }
      }
    }
  });
}

void scatter_wide(const Tensor& rows, const Tensor& ids, const Tensor& out, const Tensor& rest) {
  if (out.scalar_type() == at::kDouble) {
    scatter<double>(rows, ids, out, rest);
  } else {
    scatter<float>(rows, ids, out, rest);
  }
}

Tensor upstream_of(const Grads& output_grads, at::ScalarType wide) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  const std::optional<Tensor> grad = output_grads[0];
  return grad.has_value() && grad->defined() ? grad->to(wide).contiguous() : Tensor();
}

std::vector<Tensor> gather_tokens_backward(const Grads& output_grads, const Tensor& tokens,
                                           const Tensor& ids, at::TensorList /*saved*/,
                                           const Wanted& wanted) {
  if (!wanted[0]) return {};
  const auto wide = tokens.options().dtype(accumulation_type(tokens.scalar_type()));
  const Tensor out = at::zeros(tokens.sizes(), wide);
  const Tensor upstream = upstream_of(output_grads, out.scalar_type());
  if (upstream.defined()) {
    scatter_wide(upstream, checked("ids", ids, tokens.size(0), tokens.size(1)), out, Tensor());
  }
  return {out.to(tokens.scalar_type())};
}

Tensor restore_tokens(const Tensor& tokens, const Tensor& ids_restore, const Tensor& mask_token) {
  const Tensor from = tokens.contiguous();
  const int64_t batch = from.size(0), kept = from.size(1), width = from.size(2);
  const Tensor index = checked("ids_restore", ids_restore, batch, ids_restore.size(1));
  const Tensor filler = mask_token.to(tokens.scalar_type()).contiguous();
  TORCH_CHECK_VALUE(filler.numel() == width, "mask_token: got shape ", mask_token.sizes(),
                    ", expected [", width, "]");
  const int64_t length = index.size(1);
  const Tensor out = at::empty({batch, length, width}, tokens.options());
  const size_t row = static_cast<size_t>(width) * from.element_size();
  const char* source = static_cast<const char*>(from.const_data_ptr());
  const char* token = static_cast<const char*>(filler.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* id = index.const_data_ptr<int64_t>();
  at::parallel_for(0, batch * length, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* at = id[i] < kept ? source + (i / length * kept + id[i]) * row : token;
      std::memcpy(to + i * row, at, row);
    }
  });
  return out;
}

std::vector<Tensor> restore_tokens_backward(const Grads& output_grads, const Tensor& tokens,
                                            const Tensor& ids_restore, const Tensor& mask_token,
                                            at::TensorList /*saved*/, const Wanted& wanted) {
  const auto wide = tokens.options().dtype(accumulation_type(tokens.scalar_type()));
  const Tensor out = at::zeros(tokens.sizes(), wide);
  const Tensor rest = at::zeros({tokens.size(0), tokens.size(2)}, wide);
  const Tensor upstream = upstream_of(output_grads, out.scalar_type());
  if (upstream.defined()) {
    const Tensor ids =
        checked("ids_restore", ids_restore, tokens.size(0), ids_restore.size(1));
    scatter_wide(upstream, ids, out, wanted[2] ? rest : Tensor());
  }
  std::vector<Tensor> grads;
  if (wanted[0]) grads.push_back(out.to(tokens.scalar_type()));
  if (wanted[2]) {
    grads.push_back(rest.sum(0).reshape(mask_token.sizes()).to(mask_token.scalar_type()));
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("random_masking", &random_masking);
  m.impl("gather_tokens", &gather_tokens);
  m.impl("gather_tokens_backward", &gather_tokens_backward);
  m.impl("restore_tokens", &restore_tokens);
  m.impl("restore_tokens_backward", &restore_tokens_backward);
}
