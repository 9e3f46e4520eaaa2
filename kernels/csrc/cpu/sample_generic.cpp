// The sampling loops of sample_lanes.h for this instruction set.

#include "sample_lanes.h"

namespace quire {
const SampleKernels& generic_sample_kernels() { return kSampleKernels; }
}  // namespace quire
