// Implementation of the thread team; see team.h for the life of a job.

#include "team.h"

#include <chrono>
#include <stdexcept>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than the usual wait for the last items of a phase or for the next step, so that a thread
// rarely pays for being woken: tens of microseconds idle, a time slice where another process has
// taken its core meanwhile. Short enough to cost an idle engine nothing. Yielding instead of
// sleeping hands the core over for a whole slice each time.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kPausesPerClockRead = 16;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
#endif
  return cpus;
}

}  // namespace

void Gate::advance() {
  // seq_cst on both sides: either the waiter sees the new value or we see the waiter.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }
  changed_.notify_all();
}

void Gate::wait(uint32_t seen) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (value() != seen) return;
      pause();
    }
  } while (Clock::now() < end);
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

namespace {

constexpr int kItemBits = 26;
static_assert(Share::kMostItems == int64_t{1} << kItemBits);

void check_limits(const Phase* phases, int64_t num_phases) {
  if (num_phases >= Share::kMostPhases) throw std::length_error("too many phases of a job");
  for (int64_t p = 0; p < num_phases; ++p) {
    if (phases[p].items >= Share::kMostItems) throw std::length_error("too many items of a phase");
  }
}

}  // namespace

uint64_t Share::pack(const Claim& items) {
  const auto phase = static_cast<uint64_t>(items.phase);
  const auto begin = static_cast<uint64_t>(items.begin);
  return (phase << kItemBits | begin) << kItemBits | static_cast<uint64_t>(items.end);
}

Claim Share::unpack(uint64_t word) {
  constexpr uint64_t kItem = (uint64_t{1} << kItemBits) - 1;
  return {static_cast<int64_t>(word >> 2 * kItemBits),
          static_cast<int64_t>(word >> kItemBits & kItem), static_cast<int64_t>(word & kItem)};
}

bool Share::claim(bool is_owner, const Phase* phases, Claim& claim) {
  uint64_t word = word_.load(std::memory_order_acquire);
  for (;;) {
    const Claim all = unpack(word);
    if (all.begin == all.end) return false;
    const int64_t most = phases[all.phase].largest_claim;
    int64_t count = (all.end - all.begin + 1) / 2;
    if (most > 0) count = std::min(count, most);
    Claim rest = claim = all;
    if (is_owner) {
      rest.begin = claim.end = all.begin + count;
    } else {
      rest.end = claim.begin = all.end - count;
    }
    if (word_.compare_exchange_weak(word, pack(rest), std::memory_order_acq_rel)) return true;
  }
}

Team::Team(int num_threads, bool pin)
    : num_threads_(std::max(1, num_threads)),
      pin_(pin),
      cpus_(allowed_cpus()),
      shares_(std::make_unique<Share[]>(num_threads_)) {
  workers_.reserve(num_threads_ - 1);
  for (int thread = 1; thread < num_threads_; ++thread) {
    workers_.emplace_back([this, thread] { worker(thread); });
  }
}

Team::~Team() {
  stopping_ = true;
  start_.advance();
  for (std::thread& worker : workers_) worker.join();
}

// Left alone, Linux tends to wake a worker on the CPU of the caller that wakes it when the others
// are not idle, where the two then take turns.
void Team::place_threads() {
#if defined(__linux__)
  if (cpus_.size() < 2 || num_threads_ == 1) return;
  const int cpu = sched_getcpu();
  if (cpu == caller_cpu_) return;
  caller_cpu_ = cpu;
  const auto place = [](pthread_t thread, const std::vector<int>& cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int each : cpus) CPU_SET(each, &set);
    pthread_setaffinity_np(thread, sizeof(set), &set);  // only a hint: failure is harmless
  };
  std::vector<int> others;
  for (int each : cpus_) {
    if (each != cpu) others.push_back(each);
  }
  if (pin_) place(pthread_self(), {cpu});
  for (size_t i = 0; i < workers_.size(); ++i) {
    const int own = i < others.size() ? others[i] : cpus_[i % cpus_.size()];
    place(workers_[i].native_handle(), pin_ ? std::vector<int>{own} : others);
  }
#endif
}

// A worker is inside a job while it claims and runs items, and outside while it waits; it comes
// back only if the job is still the same. So a waiting worker that the system does not let run never
// keeps the caller from returning, or from starting the next job.
bool Team::enter(uint32_t job) {
  // seq_cst on both sides: either we see the job closed or `wait_for_empty` sees us inside.
  inside_.fetch_add(1, std::memory_order_seq_cst);
  if (open_.load(std::memory_order_seq_cst) == job) return true;
  exit();
  return false;
}

void Team::exit() {
  inside_.fetch_sub(1, std::memory_order_seq_cst);
  left_.advance();
}

bool Team::claim(int thread, Claim& claim) {
  for (int i = 0; i < num_threads_; ++i) {
    if (shares_[(thread + i) % num_threads_].claim(i == 0, phases_, claim)) return true;
  }
  return false;
}

// The phases before `phase` are done: deals out the next that has items.
void Team::open_phase(int64_t phase) {
  for (; phase < num_phases_ && phases_[phase].items == 0; ++phase) job_->phase_done(phase);
  done_.store(0, std::memory_order_relaxed);
  phase_.store(phase, std::memory_order_release);
  if (phase == num_phases_) return;
  const int64_t items = phases_[phase].items;
  for (int t = 0; t < num_threads_; ++t) {
    shares_[t].deal({phase, share_begin(items, t, num_threads_),
                     share_begin(items, t + 1, num_threads_)});
  }
}

void Team::work(int thread, uint32_t job) {
  const bool is_caller = thread == 0;
  if (!is_caller && !enter(job)) return;
  for (;;) {
    const uint32_t seen = progress_.value();
    Claim claimed;
    while (claim(thread, claimed)) {
      job_->run(claimed, thread);
      const int64_t count = claimed.end - claimed.begin;
      if (done_.fetch_add(count, std::memory_order_acq_rel) + count ==
          phases_[claimed.phase].items) {
        job_->phase_done(claimed.phase);
        open_phase(claimed.phase + 1);
        progress_.advance();
      }
    }
    if (phase_.load(std::memory_order_acquire) == num_phases_) break;
    if (!is_caller) {
      job_->leave();
      exit();
    }
    progress_.wait(seen);
    if (!is_caller && !enter(job)) return;
  }
  job_->leave();
  if (!is_caller) exit();
}

void Team::worker(int thread) {
  for (uint32_t seen = 0;;) {
    start_.wait(seen);
    seen = start_.value();
    if (stopping_) return;
    work(thread, seen);
  }
}

void Team::wait_for_empty() {
  for (uint32_t seen = left_.value(); inside_.load(std::memory_order_seq_cst) != 0;
       seen = left_.value()) {
    left_.wait(seen);
  }
}

void Team::settle() {
  std::lock_guard<std::mutex> turn(turn_);
  wait_for_empty();
}

void Team::rouse() {
  const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
  if (turn.owns_lock() && num_threads_ > 1) start_.advance();  // the number of no job
}

void Team::run(Phase* phases, int64_t num_phases, Job& job) {
  check_limits(phases, num_phases);
  std::lock_guard<std::mutex> turn(turn_);
  place_threads();
  wait_for_empty();
  phases_ = phases;
  num_phases_ = num_phases;
  job_ = &job;
  open_phase(0);
  // Jobs are numbered by the start gate: it shows the number once the job is open.
  const uint32_t number = start_.value() + 1;
  open_.store(number, std::memory_order_seq_cst);
  if (num_threads_ > 1) start_.advance();
  work(0, number);
  open_.store(0, std::memory_order_seq_cst);
}

}  // namespace quire

extern "C" {

quire::Team* quire_team_create(int num_threads, int pin) {
  return new quire::Team(num_threads, pin != 0);
}

void quire_team_destroy(quire::Team* team) { delete team; }

int quire_team_size(const quire::Team* team) { return team->size(); }

void quire_team_rouse(quire::Team* team) { team->rouse(); }
}
