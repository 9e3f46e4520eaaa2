// Sampling on the CPU: see sample.h for the interface, kernels/sampling.py for the contract.
//
// A draw is a few passes over its row: the largest logit; what the filters need; the winner. All
// filters keep a prefix of one order (logit descending, then id ascending), so each reduces to a
// place in that order, a `Cut`, and the last pass tests it as it goes. No row is ever sorted:
//
//   top-k           a heap of k, entered only by what exceeds its worst (k log k expected)
//   top-p           masses in 2048 bins of scores; only the bin that the limit falls in is sorted
//   top-k and top-p the k tokens of the heap, sorted
//   min-p           a least score
//
// Threads take draws, or the parts of one row when draws are fewer than threads. Sums are made
// per part and added in order, so the result is the same either way.

#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "sample_kernels.h"

namespace quire {

const SampleKernels& sample_kernels() {
  static const SampleKernels& chosen = []() -> const SampleKernels& {
    [[maybe_unused]] const char* isa = kernels().name;
#if defined(QUIRE_HAVE_AVX2)
    if (std::strcmp(isa, "avx2") == 0) return avx2_sample_kernels();
#endif
#if defined(QUIRE_HAVE_AVX512)
    if (std::strcmp(isa, "generic") != 0) return avx512_sample_kernels();
#endif
    return generic_sample_kernels();
  }();
  return chosen;
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kGreedyBelow = 1e-5f;
constexpr Cut kNoCut{-kInfinity, std::numeric_limits<int32_t>::max(), -kInfinity};

// NaN counts as -inf and +inf as the largest float.
float clean(float logit) { return std::isnan(logit) ? -kInfinity : std::min(logit, kLargest); }

struct Token {
  float logit;
  int32_t id;
};

bool before(Token a, Token b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// A row of logits and who works on it: the caller alone, or the team part by part.
class Row {
 public:
  Row(const float* logits, int64_t vocabulary, Team* team)
      : logits_(logits), vocabulary_(static_cast<int>(vocabulary)), team_(team) {}

  int num_parts() const { return (vocabulary_ + kPart - 1) / kPart; }

  // The largest logit and the first token that has it; id -1 when there is none.
  Token largest() const {
    std::vector<float> of_part(num_parts());
    each_part([&](int part, const float* x, int n) { of_part[part] = loops_.largest(x, n); });
    const auto best = std::max_element(of_part.begin(), of_part.end());
    if (*best == -kInfinity) return {-kInfinity, -1};
    const int begin = static_cast<int>(best - of_part.begin()) * kPart;
    const float below = std::nextafter(*best, -kInfinity);
    return {clean(*best), loops_.next_above(logits_, begin, vocabulary_, below)};
  }

  // The first min(k, V) tokens, in order.
  std::vector<Token> top(int64_t k) const {
    std::vector<Token> tokens;
    if (team_ == nullptr) {
      tokens = top_of(0, vocabulary_, k);
    } else {
      std::vector<std::vector<Token>> of_part(num_parts());
      each_part([&](int part, const float*, int n) {
        of_part[part] = top_of(part * kPart, part * kPart + n, k);
      });
      for (const auto& part : of_part) tokens.insert(tokens.end(), part.begin(), part.end());
    }
    std::sort(tokens.begin(), tokens.end(), before);
    if (static_cast<int64_t>(tokens.size()) > k) tokens.resize(k);
    return tokens;
  }

  // Sum of exp(score) over the row.
  double mass(Scale scale) const {
    std::vector<double> of_part(num_parts());
    each_part([&](int part, const float* x, int n) { of_part[part] = loops_.mass(x, n, scale); });
    double total = 0;
    for (const double mass : of_part) total += mass;
    return total;
  }

  // Sum of exp(score) of each bin, and of what lies behind the last.
  std::vector<double> bin_masses(Scale scale) const {
    constexpr int kAll = kBins + 1;
    std::vector<double> of_part(static_cast<size_t>(num_parts()) * kAll);
    each_part([&](int part, const float* x, int n) {
      const Bins bins(x, n, scale);
      double* masses = of_part.data() + static_cast<size_t>(part) * kAll;
      for (int i = 0; i < n; ++i) masses[bins.bin[i]] += bins.weight[i];
    });
    std::vector<double> total(of_part.begin(), of_part.begin() + kAll);
    for (int part = 1; part < num_parts(); ++part) {
      for (int b = 0; b < kAll; ++b) total[b] += of_part[static_cast<size_t>(part) * kAll + b];
    }
    return total;
  }

  // The tokens of one bin, in order.
  std::vector<Token> tokens_of_bin(Scale scale, int bin) const {
    std::vector<std::vector<Token>> of_part(num_parts());
    each_part([&](int part, const float* x, int n) {
      const Bins bins(x, n, scale);
      for (int i = 0; i < n; ++i) {
        if (bins.bin[i] == bin) of_part[part].push_back({clean(x[i]), part * kPart + i});
      }
    });
    std::vector<Token> tokens;
    for (const auto& part : of_part) tokens.insert(tokens.end(), part.begin(), part.end());
    std::sort(tokens.begin(), tokens.end(), before);
    return tokens;
  }

  // The winner among the kept tokens.
  int32_t draw(Scale scale, Cut cut, NoiseKey key) const {
    std::vector<Best> of_part(num_parts());
    each_part([&](int part, const float* x, int n) {
      of_part[part] = loops_.draw(x, n, part * kPart, scale, cut, key);
    });
    Best best = of_part[0];
    for (const Best& other : of_part) {
      if (other.total > best.total) best = other;
    }
    return best.id;
  }

  // 1 for the first token in order.
  int32_t rank(int32_t id) const {
    const float logit = clean(logits_[id]);
    std::vector<int> of_part(num_parts());
    each_part([&](int part, const float* x, int n) {
      const int earlier = std::clamp(id - part * kPart, 0, n);
      of_part[part] = loops_.count_above(x, n, logit) + loops_.count_equal(x, earlier, logit);
    });
    int32_t rank = 1;
    for (const int count : of_part) rank += count;
    return rank;
  }

 private:
  // Bins and weights of a part, in the calling thread's own buffers.
  struct Bins {
    Bins(const float* x, int n, Scale scale) {
      thread_local std::vector<int32_t> bins(kPart);
      thread_local std::vector<float> weights(kPart);
      bin = bins.data();
      weight = weights.data();
      sample_kernels().bins(x, n, scale, bin, weight);
    }
    int32_t* bin;
    float* weight;
  };

  template <class F>
  void each_part(F&& body) const {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int part = static_cast<int>(begin); part < end; ++part) {
        body(part, logits_ + static_cast<int64_t>(part) * kPart,
             std::min(kPart, vocabulary_ - part * kPart));
      }
    };
    if (team_ == nullptr) {
      some(0, num_parts());
    } else {
      team_->parallel_for(num_parts(), 1, some);
    }
  }

  // The first k tokens of [begin, end), in any order: a heap whose front is the worst.
  std::vector<Token> top_of(int begin, int end, int64_t k) const {
    std::vector<Token> heap;
    heap.reserve(std::min<int64_t>(k, end - begin));
    int i = begin;
    for (; i < end && static_cast<int64_t>(heap.size()) < k; ++i) {
      heap.push_back({clean(logits_[i]), i});
    }
    std::make_heap(heap.begin(), heap.end(), before);
    if (heap.empty()) return heap;
    // ids ascend, so a token equal to the worst comes behind it
    for (; (i = loops_.next_above(logits_, i, end, heap.front().logit)) < end; ++i) {
      std::pop_heap(heap.begin(), heap.end(), before);
      heap.back() = {clean(logits_[i]), i};
      std::push_heap(heap.begin(), heap.end(), before);
    }
    return heap;
  }

  const float* logits_;
  int vocabulary_;
  Team* team_;
  const SampleKernels& loops_ = sample_kernels();
};

double weight_of(Token token, Scale scale) {
  return std::exp(static_cast<double>((token.logit - scale.largest) / scale.temperature));
}

// The last of `tokens` (in order, not empty) to keep: the one whose mass takes the sum, `above`
// before the first, to the limit.
Cut cut_at_mass(const std::vector<Token>& tokens, Scale scale, double above, double limit) {
  size_t last = 0;
  for (double sum = above; last + 1 < tokens.size(); ++last) {
    sum += weight_of(tokens[last], scale);
    if (sum >= limit) break;
  }
  return {tokens[last].logit, tokens[last].id, -kInfinity};
}

Cut cut_top_k(const Row& row, Scale scale, int64_t k, double top_p) {
  std::vector<Token> tokens = row.top(k);
  if (top_p >= 1) return {tokens.back().logit, tokens.back().id, -kInfinity};
  double total = 0;
  for (const Token token : tokens) total += weight_of(token, scale);
  return cut_at_mass(tokens, scale, 0, top_p * total);
}

Cut cut_top_p(const Row& row, Scale scale, double top_p) {
  const std::vector<double> masses = row.bin_masses(scale);
  double total = 0;
  for (const double mass : masses) total += mass;
  double above = 0;
  int bin = 0;
  for (; bin < kBins && above + masses[bin] < top_p * total; ++bin) above += masses[bin];
  if (bin == kBins) return kNoCut;
  return cut_at_mass(row.tokens_of_bin(scale, bin), scale, above, top_p * total);
}

// --- edits --------------------------------------------------------------------------------------

void apply_mask(float* row, int64_t vocabulary, const uint32_t* allowed) {
  for (int64_t begin = 0; begin < vocabulary; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    if (word == ~0u) continue;
    for (int64_t token = begin; token < std::min(begin + 32, vocabulary); ++token) {
      if (!(word >> (token - begin) & 1u)) row[token] = -kInfinity;
    }
  }
}

void apply_penalties(float* row, int64_t vocabulary, const EditArgs& edits, int64_t draw) {
  const float repetition = edits.repetition[draw];
  const float frequency = edits.frequency[draw];
  const float presence = edits.presence[draw];
  if (repetition == 1 && frequency == 0 && presence == 0) return;
  // counts[t]: 0 for a token not seen, else 1 + how often it is in the output; zero between calls
  thread_local std::vector<int32_t> counts;
  thread_local std::vector<int32_t> seen;
  if (static_cast<int64_t>(counts.size()) < vocabulary) counts.resize(vocabulary);
  const int32_t* history = edits.history + edits.history_start[draw];
  const int32_t length = edits.history_start[draw + 1] - edits.history_start[draw];
  for (int32_t i = 0; i < length; ++i) {
    const int32_t token = history[i];
    if (token < 0 || token >= vocabulary) continue;
    if (counts[token] == 0) {
      counts[token] = 1;
      seen.push_back(token);
    }
    if (i >= edits.num_prompt[draw]) ++counts[token];
  }
  for (const int32_t token : seen) {
    const auto count = static_cast<float>(counts[token] - 1);
    const float logit = row[token];
    row[token] = logit > 0 ? logit / repetition : logit * repetition;
    row[token] -= frequency * count;
    if (count > 0) row[token] -= presence;
    counts[token] = 0;
  }
  seen.clear();
}

const float* edited(const float* row, int64_t vocabulary, const EditArgs& edits, int64_t draw) {
  thread_local std::vector<float> copy;
  copy.assign(row, row + vocabulary);
  if (edits.allowed_row[draw] >= 0) {
    const int64_t words = (vocabulary + 31) / 32;
    apply_mask(copy.data(), vocabulary, edits.allowed + words * edits.allowed_row[draw]);
  }
  for (int32_t i = edits.bias_start[draw]; i < edits.bias_start[draw + 1]; ++i) {
    const int32_t token = edits.bias_ids[i];
    if (token >= 0 && token < vocabulary) copy[token] += edits.bias_values[i];
  }
  apply_penalties(copy.data(), vocabulary, edits, draw);
  return copy.data();
}

bool is_edited(const EditArgs& edits, int64_t draw) {
  const bool penalised = edits.history_start[draw] < edits.history_start[draw + 1] &&
                         (edits.repetition[draw] != 1 || edits.frequency[draw] != 0 ||
                          edits.presence[draw] != 0);
  return edits.allowed_row[draw] >= 0 || penalised ||
         edits.bias_start[draw] < edits.bias_start[draw + 1];
}

// --- draws --------------------------------------------------------------------------------------

// Token of one draw, -1 when it has no candidate.
int32_t draw_token(const SampleArgs& args, int64_t draw, Team* team) {
  const float* logits = args.logits + args.rows[draw] * args.row_stride;
  if (args.edits != nullptr && is_edited(*args.edits, draw)) {
    logits = edited(logits, args.vocabulary, *args.edits, draw);
  }
  const Row row(logits, args.vocabulary, team);
  const Token largest = row.largest();
  const DrawRule& rule = args.rules[draw];
  const float temperature = rule.temperature;
  if (largest.id < 0 || !(temperature >= kGreedyBelow)) return largest.id;

  const Scale scale{largest.logit, temperature};
  const int64_t k = rule.top_k;
  const double top_p = rule.top_p;
  Cut cut = kNoCut;
  if (k > 0 && k < args.vocabulary) {
    cut = cut_top_k(row, scale, k, top_p);
  } else if (top_p < 1) {
    cut = cut_top_p(row, scale, top_p);
  }
  if (rule.min_p > 0) cut.score = std::log(rule.min_p);
  const NoiseKey key{static_cast<uint32_t>(rule.seed), static_cast<uint32_t>(rule.seed >> 32),
                     args.position[draw], rule.choice};
  return row.draw(scale, cut, key);
}

void logprobs_of(const LogprobArgs& args, int64_t draw, Team* team) {
  const float* logits = args.logits + args.rows[draw] * args.row_stride;
  const Row row(logits, args.vocabulary, team);
  const float largest = row.largest().logit;
  const auto log_mass = static_cast<float>(std::log(row.mass({largest, 1.0f})));
  const auto logprob = [&](float logit) { return (logit - largest) - log_mass; };
  const int32_t id = args.token_ids[draw];
  args.chosen[draw] = logprob(clean(logits[id]));
  args.ranks[draw] = row.rank(id);
  if (args.num_top == 0) return;
  const std::vector<Token> top = row.top(args.num_top);
  for (size_t i = 0; i < top.size(); ++i) {
    args.top_ids[draw * args.num_top + i] = top[i].id;
    args.top[draw * args.num_top + i] = logprob(top[i].logit);
  }
}

bool in_range(const int32_t* indices, int64_t count, int64_t end) {
  return std::all_of(indices, indices + count, [&](int32_t i) { return i >= 0 && i < end; });
}

// body(draw, team): draws side by side on one thread each, or one after the other on all.
template <class F>
void each_draw(Team& team, int64_t num_draws, int64_t vocabulary, F&& body) {
  if (num_draws < team.size() && vocabulary > kPart) {
    for (int64_t draw = 0; draw < num_draws; ++draw) body(draw, &team);
    return;
  }
  team.parallel_for(num_draws, 1, [&](int64_t begin, int64_t end) {
    for (int64_t draw = begin; draw < end; ++draw) body(draw, nullptr);
  });
}

}  // namespace
}  // namespace quire

extern "C" {

int32_t quire_sample(quire::Team* team, const quire::SampleArgs* args) {
  if (!quire::in_range(args->rows, args->num_draws, args->num_rows)) return 1;
  quire::each_draw(*team, args->num_draws, args->vocabulary, [&](int64_t draw, quire::Team* parts) {
    const int32_t token = quire::draw_token(*args, draw, parts);
    args->tokens[draw] = token < 0 ? 0 : token;
    args->invalid[draw] = token < 0;
  });
  return 0;
}

int32_t quire_logprobs(quire::Team* team, const quire::LogprobArgs* args) {
  const bool fits = quire::in_range(args->rows, args->num_draws, args->num_rows) &&
                    quire::in_range(args->token_ids, args->num_draws, args->vocabulary);
  if (!fits) return 1;
  quire::each_draw(*team, args->num_draws, args->vocabulary, [&](int64_t draw, quire::Team* parts) {
    quire::logprobs_of(*args, draw, parts);
  });
  return 0;
}

}  // extern "C"
