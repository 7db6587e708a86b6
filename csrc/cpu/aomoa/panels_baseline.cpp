// The panel kernels of panels.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/aomoa/panels_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, PanelKernels, float)
SPECTRALX_TABLE(kBaseline, PanelKernels, double)
#if !SPECTRALX_X86_TARGETS
SPECTRALX_TABLE(kBaseline, PanelKernels, c10::BFloat16)
#endif

}  // namespace spectralx::cpu
