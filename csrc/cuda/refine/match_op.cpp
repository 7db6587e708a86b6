// spectralx::match_argmax on CUDA.
#include <torch/library.h>

#include <limits>

#include "cuda/common/glue.h"
#include "cuda/refine/kernels.h"

namespace {

using namespace spectralx::cuda;

Tensor match_argmax(const Tensor& queries_, const Tensor& keys_, double scale) {
  TORCH_CHECK_VALUE(queries_.dim() == 3 && queries_.size(1) > 0, "queries: got shape ",
                    queries_.sizes(), ", expected [batch, at least 1, width]");
  TORCH_CHECK_VALUE(keys_.dim() == 3 && keys_.size(0) == queries_.size(0) &&
                        keys_.size(2) == queries_.size(2),
                    "keys: got shape ", keys_.sizes(), ", expected [", queries_.size(0),
                    ", keys, ", queries_.size(2), "]");
  TORCH_CHECK_TYPE(keys_.scalar_type() == queries_.scalar_type(), "keys: got dtype ",
                   keys_.scalar_type(), ", expected ", queries_.scalar_type(), " as queries");
  const c10::cuda::CUDAGuard guard(queries_.device());
  const Tensor queries = queries_.contiguous(), keys = keys_.contiguous();
  SpectralxMatch pass{};
  pass.type = type_code(queries);
  pass.batch = keys.size(0), pass.rows = queries.size(1), pass.count = keys.size(1);
  pass.width = keys.size(2), pass.scale = scale;
  const auto wide = queries.options().dtype(wide_type(queries));
  const int64_t splits = spectralx_match_splits(&pass);
  const Tensor scratch = at::empty({2, pass.batch, splits, pass.rows}, wide);
  const Tensor match = at::empty({pass.batch, pass.count}, keys.options().dtype(at::kLong));
  pass.queries = pointer(queries), pass.keys = pointer(keys);
  pass.peaks = pointer(scratch), pass.totals = pointer(scratch[1]);
  pass.match = pointer(match);
  check_launch("match_argmax", spectralx_match(&pass, current_stream()));
  return match;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) { m.impl("match_argmax", &match_argmax); }
