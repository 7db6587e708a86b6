// Tensors of any floating-point type read and written in runs of T.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/reconstruction/rows.h"

namespace spectralx::cpu {

// A contiguous tensor, read in T.
template <typename T>
class Reader {
 public:
  explicit Reader(const at::Tensor& tensor)
      : type_(tensor.scalar_type()), size_(static_cast<int64_t>(tensor.element_size())),
        data_(tensor.const_data_ptr()) {}

  // Values [at, at + n) are read soon.
  void prefetch(int64_t at, int64_t n) const {
#if defined(__GNUC__)
    const auto* from = static_cast<const char*>(data_) + at * size_;
    for (int64_t i = 0; i < n * size_; i += 64) __builtin_prefetch(from + i);
#endif
  }

  // Values [at, at + n): where they lie if they are T already, else converted into `buffer`.
  const T* read(int64_t at, int64_t n, T* buffer) const {
    switch (type_) {
      case at::kFloat:
        return read_as<float>(at, n, buffer);
      case at::kDouble:
        return read_as<double>(at, n, buffer);
      case at::kBFloat16:
        row_kernels<T>().widen(static_cast<const at::BFloat16*>(data_) + at, n, buffer);
        return buffer;
      default:
        return read_as<at::Half>(at, n, buffer);
    }
  }

 private:
  template <typename S>
  const T* read_as(int64_t at, int64_t n, T* buffer) const {
    const S* from = static_cast<const S*>(data_) + at;
    if constexpr (std::is_same_v<S, T>) {
      return from;
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(from[i]);
      return buffer;
    }
  }

  at::ScalarType type_;
  int64_t size_;
  const void* data_;
};

// Bytes of a tensor from which on it is written past the caches: whoever reads it next would find
// little of a larger one there, and each line would have been read before it is written.
constexpr int64_t kStreamed = 16 << 20;

// A contiguous tensor, written from T; an undefined one is not written.
template <typename T>
class Writer {
 public:
  explicit Writer(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    type_ = tensor.scalar_type();
    size_ = static_cast<int64_t>(tensor.element_size());
    data_ = static_cast<char*>(tensor.mutable_data_ptr());
    streamed_ = static_cast<int64_t>(tensor.nbytes()) >= kStreamed;
  }

  bool wanted() const { return data_ != nullptr; }

  // Values [at, at + n).
  void write(int64_t at, int64_t n, const T* from) {
    if (type_ == c10::CppTypeToScalarType<T>::value) return put(at, n, from);
    narrowed_.resize(std::max<int64_t>(narrowed_.size(), n * size_));
    void* to = streamed_ ? narrowed_.data() : data_ + at * size_;
    switch (type_) {
      case at::kBFloat16:
        row_kernels<T>().narrow(from, n, static_cast<at::BFloat16*>(to));
        break;
      case at::kHalf:
        std::copy_n(from, n, static_cast<at::Half*>(to));
        break;
      case at::kFloat:
        std::copy_n(from, n, static_cast<float*>(to));
        break;
      default:
        std::copy_n(from, n, static_cast<double*>(to));
    }
    if (streamed_) put(at, n, to);
  }

  void clear(int64_t at, int64_t n) {
    zeros_.resize(std::max<int64_t>(zeros_.size(), n * size_));
    put(at, n, zeros_.data());
  }

  // Before another thread reads.
  void finish() const {
    if (streamed_) row_kernels<T>().fence();
  }

 private:
  void put(int64_t at, int64_t n, const void* from) const {
    char* to = data_ + at * size_;
    streamed_ ? row_kernels<T>().stream(from, n * size_, to)
              : static_cast<void>(std::memcpy(to, from, n * size_));
  }

  at::ScalarType type_ = at::kFloat;
  int64_t size_ = 0;
  char* data_ = nullptr;
  bool streamed_ = false;
  std::vector<char> narrowed_, zeros_;
};

}  // namespace spectralx::cpu
