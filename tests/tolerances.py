"""The only tolerances of the tests: nothing else may loosen them."""

import torch

# Round-off that any implementation may add, relative to the largest value of the tensor compared.
ROUND_OFF = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
# A backend's error to float64 may be this many times the reference's own, in the same dtype.
FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
# On a GPU the vendor's libraries sum in other orders than on a CPU: the larger of the reference's
# two errors counts, and there the reference itself may miss by this many times a backend's bound.
DEVICE_FACTOR = 2.0
# Of the call's largest gradient: one below it, in float64, is zero in exact arithmetic (that of a
# bias before batch statistics). Nothing but round-off, it is measured against that largest one.
ZERO_GRADIENT = 1e-10

# Golden files (float32 numbers of the published code): the larger of 1e-4 and ten times the
# published code's own spread between one thread and two, relative to the array's largest value.
GOLDEN_FLOOR = 1e-4
GOLDEN_SPREAD_FACTOR = 10.0
GOLDEN_UNLISTED_SPREAD = 2e-6
# Gradients of one file share their noise: in training, a channel whose batch variance nearly
# vanishes passes on the round-off of everything before it, to all of them. The spread of a single
# gradient is one sample of that noise and small by chance in some (an exact float64 evaluation
# misses those by up to ten times what they would be allowed), so none counts as less than this
# quantile of the spreads in its file. It matters in stage 2 in training mode only: elsewhere ten
# times it is below the floor.
GOLDEN_GRADIENT_QUANTILE = 0.75
# A bias gradient below this share of its weight's gradient (norms) is zero in exact arithmetic: in
# the golden files those are under 4e-6 and all others over 1e-3.
GOLDEN_ZERO_GRADIENT = 1e-4
# The losses of stage 2's curve go through steps of AdamW, whose first ones are as long as the
# learning rate whichever way round-off points a small gradient, and through choices of tokens and
# experts. The reference's own spread between one thread and two is 2.5e-4 of the largest loss, the
# published code's 9e-5 another sample of it: the larger counts.
GOLDEN_CURVE_SPREAD = 2.5e-4
