// Recording and replay of programs; see program.h. Also their C ABI.

#include "program.h"

#include <chrono>
#include <stdexcept>

namespace quire {
namespace {

constexpr int64_t kAlignment = 64;
// Rows from which a matmul computes longer than it reads.
constexpr int64_t kFetchRows = 16;
// Keys and values that stay in a last-level cache until their attention, beside the weights.
constexpr int64_t kFetchBytes = 8 << 20;

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
  if (op.code == OpCode::kAttention) share_fetching(op.attention.shape.layer);
  if (op.code == OpCode::kLinear) {
    const auto linear = static_cast<int64_t>(ops_.size());
    for (int64_t i = linear; i-- > 0 && next_linear_[i] == 0;) next_linear_[i] = linear;
  }
  ops_.push_back(op);
  shares_.push_back({});
  next_linear_.push_back(0);
}

// Divides what the attention of `layer`, about to be added, reads among the matmuls since the one
// before it.
void Program::share_fetching(int64_t layer) {
  int64_t products = 0;
  auto op = static_cast<int64_t>(ops_.size()) - 1;
  for (; op >= 0 && ops_[op].code != OpCode::kAttention; --op) {
    if (ops_[op].code != OpCode::kLinear) continue;
    const int64_t begin = products;
    products += ops_[op].linear.n * ops_[op].linear.k;
    shares_[op] = {layer, begin, products, 0};
  }
  while (++op < static_cast<int64_t>(ops_.size())) {
    if (ops_[op].code == OpCode::kLinear) shares_[op].whole = products;
  }
}

// What to fetch beside a claim of the share of `owner`: of what the attention's same share reads.
Fetch Program::fetch_of(int64_t op, const Claim& claim, int owner) const {
  const FetchShare& share = shares_[op];
  if (share.whole == 0 || step_.args.num_tokens < kFetchRows) return {};
  const int64_t span_bytes = 2 * step_.cache.tile_bytes(step_.dtype);
  const int64_t lines = span_bytes / 64;
  const int64_t all = lines * static_cast<int64_t>(spans_.size());
  const int64_t items = phases_[claim.phase].items;
  const int64_t from = share_begin(items, owner, team_.size());
  const int64_t count = share_begin(items, owner + 1, team_.size()) - from;
  const int64_t own = share_begin(all, owner, team_.size());
  const int64_t own_lines = share_begin(all, owner + 1, team_.size()) - own;
  const auto line = [&](int64_t item) {
    const int64_t products = share.begin * count + (share.end - share.begin) * (item - from);
    return own + own_lines * products / (share.whole * count);
  };
  const int64_t first = line(claim.begin);
  const int64_t left = line(claim.end) - first;
  if (left == 0) return {};
  Fetch fetch;
  fetch.offset = share.layer * span_bytes;
  fetch.span_lines = lines;
  fetch.span_left = lines - first % lines;
  fetch.left = left;
  const char* const* span = spans_.data() + first / lines;
  fetch.at = *span + fetch.offset + first % lines * 64;
  fetch.spans = span + 1;
  return fetch;
}

// What a thread reads first of the matmul after `op`.
NextLinear Program::next_of(int64_t op, int thread) const {
  const int64_t next = next_linear_[op];
  if (next == 0 || next >= first_op_ + num_phases_) return {};
  return {&ops_[next].linear, share_begin(phases_[next - first_op_].items, thread, team_.size())};
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
  const int32_t* table = args.block_tables + s * args.block_table_stride;
  for (int64_t i = first_block(args, s); i < blocks; ++i) {
    require(table[i] >= 0 && table[i] < step_.cache.num_blocks, "block outside the pool", i,
            table[i]);
  }
}

// The first block that some layer reads. Blocks that have left every layer's window may have been
// given to others: not read, not checked.
int64_t Program::first_block(const StepArgs& args, int64_t s) const {
  if (largest_window_ == 0) return 0;
  const int64_t first = args.context_lens[s] - (args.query_start[s + 1] - args.query_start[s]);
  return std::max<int64_t>(0, first + 1 - largest_window_) / kBlockTokens;
}

void Program::plan(const StepArgs& args) {
  step_.args = args;
  step_.runs.clear();
  step_.groups.clear();
  spans_.clear();
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
    list_spans(s);
    const auto tokens = static_cast<int32_t>(tokens_per_group_);
    for (int32_t row = args.query_start[s]; row < end; row += tokens) {
      step_.groups.push_back({static_cast<int32_t>(s), row, std::min(tokens, end - row)});
    }
  }
}

// In the order of attention's items.
void Program::list_spans(int64_t s) {
  const auto most = static_cast<size_t>(kFetchBytes / (2 * step_.cache.tile_bytes(step_.dtype)));
  const int64_t end = ceil_div(step_.args.context_lens[s], kBlockTokens);
  for (int64_t head = 0; head < step_.cache.num_kv_heads; ++head) {
    for (int64_t i = first_block(step_.args, s); i < end && spans_.size() < most; ++i) {
      spans_.push_back(step_.k_tile(step_.block_table(s)[i], head, 0));
    }
  }
}

void Program::run(const Claim& claim, int thread) {
  const int64_t index = first_op_ + claim.phase;
  const Op& op = ops_[index];
  const auto base = reinterpret_cast<uintptr_t>(scratch_.data());
  char* aligned = scratch_.data() + (round_up(base, kAlignment) - base);
  Workspace space{aligned + thread * scratch_stride_, {}, {}};
  if (op.code == OpCode::kLinear) {
    const int64_t items = phases_[claim.phase].items;
    const int owner = share_owner(items, claim.begin, team_.size());
    const bool is_last = claim.end == share_begin(items, owner + 1, team_.size());
    space.fetch = fetch_of(index, claim, owner);
    if (is_last || owner != thread) space.next = next_of(index, thread);
  }
  kernels_.of[static_cast<int>(op.code)].run(op, step_, claim.begin, claim.end, space);
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
  num_phases_ = end - begin;
  for (int64_t i = begin; i < end; ++i) {
    const Op& op = ops_[i];
    phases_[i - begin].items = kernels_.of[static_cast<int>(op.code)].items(op, step_);
  }
  phase_started_ = now();
  team_.run(phases_.get(), num_phases_, *this);
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
