// Recording and replay of programs; see program.h. Also their C ABI.

#include "program.h"

#include <chrono>
#include <stdexcept>

namespace quire {
namespace {

constexpr int64_t kAlignment = 64;

class BadStep : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void require(bool condition, const char* what, int64_t index, int64_t value) {
  if (condition) return;
  throw BadStep(std::string(what) + " (index " + std::to_string(index) + ", value " +
                std::to_string(value) + ")");
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Program::Program(Team& team, const Cache& cache, DType dtype, const Limits& limits)
    : team_(team), kernels_(kernels()), limits_(limits) {
  step_.dtype = dtype;
  step_.cache = cache;
  scratch_stride_ = round_up(kernels_.scratch_bytes, kAlignment);
  scratch_.resize(scratch_stride_ * team.size() + kAlignment);
}

Program::~Program() { team_.settle(); }

void Program::add(const Op& op) {
  phases_.reset();
  if (op.code == OpCode::kEmbed) vocabulary_ = op.embed.vocabulary;
  if (op.code == OpCode::kRopeAndCache) {
    max_positions_ = std::min(max_positions_, op.rope.max_positions);
  }
  if (op.code == OpCode::kAttention) {
    const bool first = tokens_per_group_ == 0;
    const int64_t tokens = tokens_per_group(op.attention.shape);
    const int64_t window = op.attention.window;
    if (!first && tokens != tokens_per_group_) {
      throw std::invalid_argument("all attentions of a program need one ratio of heads");
    }
    const bool unlimited = window == 0 || (!first && largest_window_ == 0);
    largest_window_ = unlimited ? 0 : std::max(largest_window_, window);
    tokens_per_group_ = tokens;
  }
  ops_.push_back(op);
}

void Program::check(const StepArgs& args) {
  require(args.num_tokens >= 1 && args.num_tokens <= limits_.max_tokens, "number of tokens", 0,
          args.num_tokens);
  require(args.num_seqs >= 1 && args.num_seqs <= limits_.max_seqs, "number of sequences", 0,
          args.num_seqs);
  require(args.num_logit_rows >= 0 && args.num_logit_rows <= limits_.max_logit_rows,
          "number of logit rows", 0, args.num_logit_rows);
  if (vocabulary_ > 0) {
    for (int64_t i = 0; i < args.num_tokens; ++i) {
      const int32_t id = args.token_ids[i];
      require(id >= 0 && id < vocabulary_, "token id outside the vocabulary", i, id);
    }
  }
  for (int64_t i = 0; i < args.num_logit_rows; ++i) {
    const int32_t row = args.logit_rows[i];
    require(row >= 0 && row < args.num_tokens, "logit row outside the step", i, row);
  }
  require(args.query_start[0] == 0, "query_start must begin at 0", 0, args.query_start[0]);
  for (int64_t s = 0; s < args.num_seqs; ++s) check_sequence(args, s);
  const int64_t end = args.query_start[args.num_seqs];
  require(end == args.num_tokens, "query_start must end at the number of tokens", args.num_seqs,
          end);
}

void Program::check_sequence(const StepArgs& args, int64_t s) {
  const int64_t begin = args.query_start[s];
  const int64_t end = args.query_start[s + 1];
  const int64_t context = args.context_lens[s];
  require(begin < end && end <= args.num_tokens, "query_start must ascend", s + 1, end);
  const int64_t first = context - (end - begin);
  require(first >= 0, "context shorter than the sequence's rows", s, context);
  const int64_t blocks = ceil_div(context, kBlockTokens);
  require(blocks <= std::min(limits_.max_blocks_per_seq, args.block_table_stride),
          "context longer than its block table", s, context);
  require(context <= max_positions_, "context longer than the rotary table", s, context);
  for (int64_t row = begin; row < end; ++row) {
    require(args.positions[row] == first + row - begin,
            "positions must ascend to the end of the context", row, args.positions[row]);
  }
  // Blocks that have left every layer's window may have been given to others: not read, not checked.
  const bool limited = largest_window_ > 0;
  const int64_t seen = limited ? std::max<int64_t>(0, first + 1 - largest_window_) : 0;
  const int32_t* table = args.block_tables + s * args.block_table_stride;
  for (int64_t i = seen / kBlockTokens; i < blocks; ++i) {
    require(table[i] >= 0 && table[i] < step_.cache.num_blocks, "block outside the pool", i,
            table[i]);
  }
}

void Program::plan(const StepArgs& args) {
  step_.args = args;
  step_.runs.clear();
  step_.groups.clear();
  for (int64_t s = 0; s < args.num_seqs; ++s) {
    const int32_t end = args.query_start[s + 1];
    for (int32_t row = args.query_start[s]; row < end;) {
      const int32_t slot = args.positions[row] % kBlockTokens;
      const int32_t count = std::min(kBlockTokens - slot, end - row);
      const int32_t block = step_.block_table(s)[args.positions[row] / kBlockTokens];
      step_.runs.push_back({row, count, block, slot});
      row += count;
    }
    if (tokens_per_group_ == 0) continue;
    const auto tokens = static_cast<int32_t>(tokens_per_group_);
    for (int32_t row = args.query_start[s]; row < end; row += tokens) {
      step_.groups.push_back({static_cast<int32_t>(s), row, std::min(tokens, end - row)});
    }
  }
}

void Program::run(int64_t phase, int64_t begin, int64_t end, int thread) {
  const Op& op = ops_[first_op_ + phase];
  const auto base = reinterpret_cast<uintptr_t>(scratch_.data());
  char* aligned = scratch_.data() + (round_up(base, kAlignment) - base);
  char* scratch = aligned + thread * scratch_stride_;
  kernels_.of[static_cast<int>(op.code)].run(op, step_, begin, end, scratch);
}

void Program::phase_done(int64_t phase) {
  if (profile_ == nullptr) return;
  const double finished = now();
  profile_[first_op_ + phase] += finished - phase_started_;
  phase_started_ = finished;
}

const char* Program::run(const StepArgs& args, int64_t begin, int64_t end) {
  try {
    check(args);
  } catch (const BadStep& bad) {
    error_ = bad.what();
    return error_.c_str();
  }
  team_.settle();  // a late thread may still be looking at the last run's phases
  plan(args);
  if (phases_ == nullptr) phases_ = std::make_unique<Phase[]>(ops_.size());
  first_op_ = begin;
  for (int64_t i = begin; i < end; ++i) {
    const Op& op = ops_[i];
    phases_[i - begin].items = kernels_.of[static_cast<int>(op.code)].items(op, step_);
  }
  phase_started_ = now();
  team_.run(phases_.get(), end - begin, *this);
  return nullptr;
}

}  // namespace quire

extern "C" {

quire::Program* quire_program_create(quire::Team* team, const quire::Cache* cache, int32_t dtype,
                                     const quire::Limits* limits) {
  return new quire::Program(*team, *cache, static_cast<quire::DType>(dtype), *limits);
}

void quire_program_destroy(quire::Program* program) { delete program; }

// Size of one recorded operation: checked against the binding's mirror of the struct.
int64_t quire_op_bytes() { return sizeof(quire::Op); }

// Nonzero when the operation does not fit the program.
int32_t quire_program_add(quire::Program* program, const quire::Op* op) {
  try {
    program->add(*op);
  } catch (const std::invalid_argument&) {
    return 1;
  }
  return 0;
}

int64_t quire_program_size(const quire::Program* program) { return program->size(); }

void quire_program_set_profile(quire::Program* program, double* seconds) {
  program->set_profile(seconds);
}

// See Program::run.
const char* quire_program_run(quire::Program* program, const quire::StepArgs* args, int64_t begin,
                              int64_t end) {
  return program->run(*args, begin, end);
}
}
