// The table of sample_kernels.h in `Lanes` and `Words`; compiled once per instruction set.

#pragma once

#include "sample_kernels.h"
#include "words.h"

namespace quire {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargestFloat = 3.40282347e38f;
constexpr int kWide = 64;  // tokens of sixteen Philox counters

inline int part_of(int n, int begin) { return n - begin < kLanes ? n - begin : kLanes; }

// Sixteen logits, -inf behind the end of the row.
inline Lanes load_logits(const float* p, int n) {
  if (n >= kLanes) return load(p);
  if (n <= 0) return splat(-kInfinity);
  return keep(load_partial(p, n), 0, n, splat(-kInfinity));
}

// The operand order matters: max(NaN, b) and min(a, NaN) are their second operand, b and NaN.
inline Lanes clean(Lanes x) { return max(min(splat(kLargestFloat), x), splat(-kInfinity)); }

inline Lanes score(Lanes x, Scale scale) {
  return (clean(x) - splat(scale.largest)) / splat(scale.temperature);
}

inline Lanes weight(Lanes score) { return where_at_least(exp(score), score, splat(-87.0f)); }

float largest_of(const float* x, int n) {
  Lanes best = splat(-kInfinity);
  for (int i = 0; i < n; i += kLanes) best = max(load_logits(x + i, n - i), best);
  return largest(best);
}

int next_above(const float* x, int begin, int n, float limit) {
  for (int i = begin; i < n; i += kLanes) {
    const uint32_t above = greater(load_logits(x + i, n - i), splat(limit));
    if (above) return i + __builtin_ctz(above);
  }
  return n;
}

int count_above(const float* x, int n, float value) {
  int count = 0;
  for (int i = 0; i < n; i += kLanes) {
    count += __builtin_popcount(greater(load_logits(x + i, n - i), splat(value)));
  }
  return count;
}

int count_equal(const float* x, int n, float value) {
  int count = 0;
  for (int i = 0; i < n; i += kLanes) {
    const uint32_t same = equal(load_logits(x + i, n - i), splat(value));
    // behind the end lie values of -inf, which a row may contain as well
    count += __builtin_popcount(same & ((1u << part_of(n, i)) - 1u));
  }
  return count;
}

double mass(const float* x, int n, Scale scale) {
  Lanes total = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    total = total + weight(score(load_logits(x + i, n - i), scale));
  }
  return sum(total);
}

void bins(const float* x, int n, Scale scale, int32_t* bin, float* weights) {
  for (int i = 0; i < n; i += kLanes) {
    const Lanes s = score(load_logits(x + i, n - i), scale);
    const Lanes place = min(s * splat(-kBinsPerUnit), splat(kBins));
    store(bin + i, float_to_signed(place));
    store(weights + i, weight(s));
  }
}

// Philox-4x32-10 (Salmon et al., 2011) of sixteen counters: words[i] is output word i.
inline void philox(Words group, NoiseKey key, Words out[4]) {
  Words c0 = words(key.position), c1 = words(key.choice), c2 = group, c3 = words(0);
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply(c0, 0xD2511F53u), p1 = multiply(c2, 0xCD9E8D57u);
    c0 = p1.high ^ c1 ^ words(k0);
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ words(k1);
    c3 = p0.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// -log(-log1p(-u)) with u = min((word >> 1) * 2^-31 + 2^-32, 1 - 2^-24): in [-2.82, 22.19].
inline Lanes gumbel(Words word) {
  const Lanes u = min(fma(signed_to_float(shift_right<1>(word)), splat(0x1p-31f), splat(0x1p-32f)),
                      splat(1.0f - 0x1p-24f));
  // log1p(-u) = log(y) + (what y = 1 - u lost to rounding) / y
  const Lanes y = splat(1.0f) - u;
  const Lanes lost = (splat(1.0f) - y) - u;
  const Lanes exponential = splat(0.0f) - (log(y) + lost / y);
  return splat(0.0f) - log(exponential);
}

// Noise of the 64 tokens from `first` on.
inline void wide_noise(int32_t first, NoiseKey key, Lanes out[4]) {
  Words by_word[4], by_token[4];
  philox(lane_indices() + words(static_cast<uint32_t>(first) / 4), key, by_word);
  interleave(by_word[0], by_word[1], by_word[2], by_word[3], by_token);
  for (int i = 0; i < 4; ++i) out[i] = gumbel(by_token[i]);
}

void noise(int32_t first, NoiseKey key, float* out) {
  Lanes lanes[4];
  wide_noise(first, key, lanes);
  for (int i = 0; i < 4; ++i) store(out + kLanes * i, lanes[i]);
}

// The first of the largest totals among the lanes set in `candidates`.
inline void improve(Best& best, Lanes total, uint32_t candidates, int32_t first) {
  float totals[kLanes];
  store(totals, total);
  for (; candidates; candidates &= candidates - 1) {
    const int lane = __builtin_ctz(candidates);
    if (totals[lane] > best.total) best = {totals[lane], first + lane};
  }
}

inline uint32_t kept(Lanes x, Lanes s, int32_t first, Cut cut) {
  uint32_t above = greater(x, splat(cut.logit));
  const uint32_t tied = equal(x, splat(cut.logit));
  if (tied && first <= cut.id) {
    const int32_t room = cut.id - first;  // lanes 0 .. room are not behind the cut
    above |= room >= kLanes - 1 ? tied : tied & ((2u << room) - 1u);
  }
  return above & ~greater(splat(cut.score), s);
}

Best draw(const float* x, int n, int32_t first, Scale scale, Cut cut, NoiseKey key) {
  Best best{-kInfinity, -1};
  for (int i = 0; i < n; i += kWide) {
    Lanes s[4];
    uint32_t hopeful[4];
    uint32_t any = 0;
    for (int j = 0; j < 4; ++j) {
      const int at = i + kLanes * j;
      const Lanes logits = clean(load_logits(x + at, n - at));
      s[j] = score(logits, scale);
      // most tokens cannot win whatever their noise: rounding is monotonic, so this is exact
      hopeful[j] = greater(s[j] + splat(kMostNoise), splat(best.total));
      if (hopeful[j]) hopeful[j] &= kept(logits, s[j], first + at, cut);
      any |= hopeful[j];
    }
    if (!any) continue;
    Lanes noises[4];
    wide_noise(first + i, key, noises);
    for (int j = 0; j < 4; ++j) {
      const Lanes total = s[j] + noises[j];
      const uint32_t better = greater(total, splat(best.total)) & hopeful[j];
      if (better) improve(best, total, better, first + i + kLanes * j);
    }
  }
  return best;
}

constexpr SampleKernels kSampleKernels{largest_of, next_above, count_above, count_equal, mass,
                                       bins,       draw,       noise};

}  // namespace
}  // namespace quire
