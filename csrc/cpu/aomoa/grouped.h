// The experts of a chunk on the tokens that take them: what a layer with many experts does.
#pragma once

#include "cpu/aomoa/backward.h"

namespace spectralx::cpu {

// z operand panels [panels][r][32], gates [A, tokens, E] to the mixture c, as operand panels.
template <typename Op>
void mix_grouped(const Layer<Op>& l, const Chunk& chunk, const Tensor& z, const Tensor& gates,
                 const Tensor& c);

// Routing and mixture again, then back to z: fills what the trail holds of them, and adds to the
// gradients of the experts' weights and biases.
template <typename Op>
void unmix_grouped(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
                   Trail<Op>& trail);

}  // namespace spectralx::cpu
