// Tensors of any floating-point type read and written in runs of T.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "cpu/reconstruction/rows.h"

namespace spectralx::cpu {

// A contiguous tensor, read in T.
template <typename T>
class Reader {
 public:
  explicit Reader(const at::Tensor& tensor)
      : type_(tensor.scalar_type()), data_(tensor.const_data_ptr()) {}

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
  const void* data_;
};

// A contiguous tensor, written in T; an undefined one is not written.
template <typename T>
class Writer {
 public:
  explicit Writer(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    type_ = tensor.scalar_type();
    data_ = tensor.mutable_data_ptr();
  }

  bool wanted() const { return data_ != nullptr; }

  // Where to put values [at, at + n): their place if they are T, else `buffer`, for `flush`.
  T* place(int64_t at, T* buffer) const {
    return type_ == c10::CppTypeToScalarType<T>::value ? static_cast<T*>(data_) + at : buffer;
  }

  void flush(int64_t at, int64_t n, const T* from) const {
    switch (type_) {
      case at::kBFloat16:
        return row_kernels<T>().narrow(from, n, static_cast<at::BFloat16*>(data_) + at);
      case at::kHalf:
        return copy<at::Half>(at, n, from);
      case at::kFloat:
        return copy<float>(at, n, from);
      default:
        return copy<double>(at, n, from);
    }
  }

  void clear(int64_t at, int64_t n) const {
    const auto size = static_cast<int64_t>(c10::elementSize(type_));
    std::fill_n(static_cast<char*>(data_) + at * size, n * size, char(0));
  }

 private:
  template <typename S>
  void copy(int64_t at, int64_t n, const T* from) const {
    S* to = static_cast<S*>(data_) + at;
    if constexpr (std::is_same_v<S, T>) {
      if (to == from) return;
    }
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);
  }

  at::ScalarType type_ = at::kFloat;
  void* data_ = nullptr;
};

}  // namespace spectralx::cpu
