// Labels as they come: int64, int32, int16 or uint8, any strides, without a copy; and those that are
// no class.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace spectralx::cpu {

// Calls use(type tag) with the integer type of `labels`.
template <typename Use>
void with_label_type(const char* name, const at::Tensor& labels, Use use) {
  switch (labels.scalar_type()) {
    case at::kLong:
      return use(int64_t{});
    case at::kInt:
      return use(int32_t{});
    case at::kShort:
      return use(int16_t{});
    case at::kByte:
      return use(uint8_t{});
    default:
      TORCH_CHECK_TYPE(false, name, ": got dtype ", labels.scalar_type(),
                       ", expected int64, int32, int16 or uint8");
  }
}

// The lowest and highest of the values that are no class: what an error names.
struct WrongValues {
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();

  void see(int64_t value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  void see(const WrongValues& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
  bool any() const { return low <= high; }
  int64_t named() const { return low < 0 ? low : high; }
};

inline void refuse_wrong_labels(const WrongValues& wrong, int64_t classes, int64_t ignore_index) {
  TORCH_CHECK_VALUE(!wrong.any(), "target: got label ", wrong.named(), ", expected 0 to ",
                    classes - 1, " or ignore_index ", ignore_index);
}

}  // namespace spectralx::cpu
