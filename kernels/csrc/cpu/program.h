// A recorded model step: operations over static buffers, replayed in one call.
//
//   record   quire_program_create, quire_program_add per operation
//   replay   quire_program_run: checks the step, derives its work lists, then
//
//            thread 0   op 0 | op 1 | op 2 | ... | op n-1 |      all threads stay inside from the
//            thread 1   op 0 | op 1 | op 2 | ... | op n-1 |      first op to the last; | = barrier

#pragma once

#include <limits>
#include <string>
#include <vector>

#include "kernels.h"

namespace quire {

struct Limits {
  int64_t max_tokens;
  int64_t max_seqs;
  int64_t max_blocks_per_seq;
  int64_t max_logit_rows;
};

class Program {
 public:
  Program(Team& team, const Cache& cache, DType dtype, const Limits& limits);

  void add(const Op& op);
  int64_t size() const { return static_cast<int64_t>(ops_.size()); }

  // Runs ops [begin, end) for one step. Returns null, or says what is wrong with the step (nothing
  // has run then). The text lives until the next call.
  const char* run(const StepArgs& args, int64_t begin, int64_t end);

  // Seconds spent in each op by thread 0, waiting included, summed over runs; null: off (default).
  void set_profile(double* seconds) { profile_ = seconds; }

 private:
  void check(const StepArgs& args);
  void check_sequence(const StepArgs& args, int64_t sequence);
  void plan(const StepArgs& args);
  void run_on(int thread, int64_t begin, int64_t end);

  Team& team_;
  const Kernels& kernels_;
  Limits limits_;
  Step step_;
  std::vector<Op> ops_;
  int64_t vocabulary_ = 0;         // 0: no embedding
  int64_t tokens_per_group_ = 0;   // 0: no attention
  int64_t largest_window_ = 0;     // of the attentions; 0: one is unlimited
  int64_t max_positions_ = std::numeric_limits<int64_t>::max();  // shortest rotary table
  std::vector<char> scratch_;
  std::string error_;
  double* profile_ = nullptr;
};

}  // namespace quire
