// The loops over a vocabulary that sampling is made of, as a table per instruction set.
//
// Each works on one part of a row of logits. NaN counts as -inf, +inf as the largest float. What
// parts a row is cut into is fixed (kPart), so sums do not depend on the number of threads.

#pragma once

#include <cstdint>

namespace quire {

// Tokens of a part: a multiple of 64, small enough to stay in the first-level cache.
constexpr int kPart = 8192;

// Noise lies between these; see `gumbel` in sample_lanes.h.
constexpr float kMostNoise = 22.2f;

// Score of a logit x: (x - largest) / temperature, at most 0.
struct Scale {
  float largest;
  float temperature;
};

// Where the filters stop in the order "logit descending, then id ascending": a token is kept if
// its logit is above `logit`, or equal and its id not above `id`; and its score at least `score`.
struct Cut {
  float logit;
  int32_t id;
  float score;
};

// Bins of scores for top-p: bin b holds scores in (-(b + 1), -b] / kBinsPerUnit. Tokens behind the
// last bin have less than 2e-14 of the likeliest token's probability and are never drawn: noises
// differ by 25.1 at most.
constexpr int kBins = 2048;
constexpr int kBinsPerUnit = 64;

// Counter and key of one draw's noise; see kernels/sampling.py.
struct NoiseKey {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t position;
  uint32_t choice;
};

struct Best {
  float total;  // score + noise
  int32_t id;   // -1 for none
};

struct SampleKernels {
  // The largest of n logits; -inf for none.
  float (*largest)(const float* x, int n);
  // The first index >= begin with x[i] > limit, or n.
  int (*next_above)(const float* x, int begin, int n, float limit);
  // How many x[i] > value, and how many x[i] == value.
  int (*count_above)(const float* x, int n, float value);
  int (*count_equal)(const float* x, int n, float value);
  // Sum of exp(score).
  double (*mass)(const float* x, int n, Scale scale);
  // Bin (kBins: behind the last) and exp(score) of each token; arrays hold kPart elements.
  void (*bins)(const float* x, int n, Scale scale, int32_t* bin, float* weight);
  // The best of the kept tokens by score + noise; x[0] is token `first`, a multiple of 64.
  Best (*draw)(const float* x, int n, int32_t first, Scale scale, Cut cut, NoiseKey key);
  // Noise of the 64 tokens from `first`, a multiple of 64.
  void (*noise)(int32_t first, NoiseKey key, float* out);
};

// Each is defined in sample_<isa>.cpp where the compiler can build it.
const SampleKernels& generic_sample_kernels();
const SampleKernels& avx2_sample_kernels();
const SampleKernels& avx512_sample_kernels();

// The table of the instruction set that kernels() has chosen.
const SampleKernels& sample_kernels();

}  // namespace quire
