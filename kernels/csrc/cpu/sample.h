// Drawing tokens from logits by the contract of kernels/sampling.py, as a C ABI.
//
// The structs are mirrored by ctypes in kernels/cpu/sampler.py. Arrays are as SamplingBatch and
// LogitEdits describe them; N draws, V tokens of vocabulary.

#pragma once

#include <cstdint>

#include "team.h"

namespace quire {

struct EditArgs {
  const float* repetition;       // [N]
  const float* frequency;        // [N]
  const float* presence;         // [N]
  const int32_t* history;        // [history_start[N]]
  const int32_t* history_start;  // [N + 1]
  const int32_t* num_prompt;     // [N]
  const int32_t* bias_ids;       // [bias_start[N]]
  const float* bias_values;      // [bias_start[N]]
  const int32_t* bias_start;     // [N + 1]
  const uint32_t* allowed;       // [M, ceil(V / 32)]
  const int32_t* allowed_row;    // [N]
};

// DRAW_RULE of kernels/sampling.py.
struct DrawRule {
  float temperature;
  int32_t top_k;
  float top_p;
  float min_p;
  uint64_t seed;
  uint32_t choice;
};

struct SampleArgs {
  const float* logits;
  int64_t num_rows;
  int64_t row_stride;  // elements between rows of logits
  int64_t vocabulary;
  int64_t num_draws;
  const int32_t* rows;         // [N]
  const DrawRule* rules;       // [N]
  const uint32_t* position;    // [N]
  const EditArgs* edits;       // or null
  int32_t* tokens;             // [N] out
  uint8_t* invalid;            // [N] out: 1 where a draw had no candidate and yields token 0
};

struct LogprobArgs {
  const float* logits;
  int64_t num_rows;
  int64_t row_stride;
  int64_t vocabulary;
  int64_t num_draws;
  int64_t num_top;           // k <= V
  const int32_t* rows;       // [N]
  const int32_t* token_ids;  // [N]
  float* chosen;             // [N] out
  int32_t* ranks;            // [N] out
  int32_t* top_ids;          // [N, k] out
  float* top;                // [N, k] out
};

}  // namespace quire

extern "C" {
// Nonzero, and nothing was done, when a row or a token id is out of range.
int32_t quire_sample(quire::Team* team, const quire::SampleArgs* args);
int32_t quire_logprobs(quire::Team* team, const quire::LogprobArgs* args);
}
