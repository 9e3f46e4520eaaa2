// A recorded model step: operations over static buffers, replayed in one call.
//
//   record   quire_program_create, quire_program_add per operation
//   replay   quire_program_run: checks the step, derives its work lists, then runs each operation as
//            a phase of one job of the team; threads stay inside from the first to the last

#pragma once

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace quire {

struct Limits {
  int64_t max_tokens;
  int64_t max_seqs;
  int64_t max_blocks_per_seq;
  int64_t max_logit_rows;
};

class Program final : private Job {
 public:
  Program(Team& team, const Cache& cache, DType dtype, const Limits& limits);
  ~Program() override;

  void add(const Op& op);
  int64_t size() const { return static_cast<int64_t>(ops_.size()); }

  // Runs ops [begin, end) for one step. Returns null, or says what is wrong with the step (nothing
  // has run then). The text lives until the next call.
  const char* run(const StepArgs& args, int64_t begin, int64_t end);

  // Where to add the seconds that each op took from start to end; null: off (default).
  void set_profile(double* seconds) { profile_ = seconds; }

 private:
  // The part of the next attention's keys and values that a matmul fetches, which is that of its
  // products in those of all matmuls before that attention.
  struct FetchShare {
    int64_t layer = 0;
    int64_t begin = 0;
    int64_t end = 0;
    int64_t whole = 0;  // 0: nothing
  };

  void share_fetching(int64_t layer);
  Fetch fetch_of(int64_t op, const Claim& claim, int owner) const;
  NextLinear next_of(int64_t op, int thread) const;
  void check(const StepArgs& args);
  void check_sequence(const StepArgs& args, int64_t sequence);
  int64_t first_block(const StepArgs& args, int64_t sequence) const;
  void list_spans(int64_t sequence);
  void plan(const StepArgs& args);

  void run(const Claim& claim, int thread) override;
  void phase_done(int64_t phase) override;
  void leave() override { kernels_.release(); }

  Team& team_;
  const Kernels& kernels_;
  Limits limits_;
  Step step_;
  std::vector<Op> ops_;
  std::vector<FetchShare> shares_;    // one per op
  std::vector<int64_t> next_linear_;  // one per op: the matmul after it, or 0
  std::vector<const char*> spans_;  // of the step: layer 0, a KV head and block each
  std::unique_ptr<Phase[]> phases_;  // one per op from first_op_ on
  int64_t first_op_ = 0;
  int64_t num_phases_ = 0;
  int64_t vocabulary_ = 0;         // 0: no embedding
  int64_t tokens_per_group_ = 0;   // 0: no attention
  int64_t largest_window_ = 0;     // of the attentions; 0: one is unlimited
  int64_t max_positions_ = std::numeric_limits<int64_t>::max();  // shortest rotary table
  int64_t scratch_stride_;
  std::vector<char> scratch_;
  std::string error_;
  double* profile_ = nullptr;
  double phase_started_ = 0.0;
};

}  // namespace quire
