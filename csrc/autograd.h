// Differentiation of the library's operators, which Python declares (_operator.py).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace spectralx {

// What the backward of an operator is given; see _autograd.Kept, which is the same.
struct Kept {
  int64_t hidden;
  std::vector<int64_t> constant, outputs;
  std::optional<int64_t> only_if;
  std::map<int64_t, std::vector<int64_t>> read_for;
};

// Differentiates spectralx::<name>[.<overload>] by spectralx::<name>_backward[.<overload>]. Both are defined.
void differentiate(const std::string& name, const std::string& overload, const Kept& kept);

}  // namespace spectralx
