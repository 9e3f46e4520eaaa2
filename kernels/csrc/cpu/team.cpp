// Implementation of the thread team; see team.h for the life of a job.

#include "team.h"

#include <chrono>

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

// An engine's step follows the last one within tens of microseconds; waking a sleeping thread
// costs about as much. So spinning longer than this only burns an idle machine's CPU.
constexpr auto kSpin = std::chrono::microseconds(50);
// A thread that a busy machine has descheduled comes back after a time slice (milliseconds):
// yield that long before paying for a sleep.
constexpr auto kYield = std::chrono::milliseconds(2);
constexpr int kPausesPerClockRead = 32;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

template <class Done, class Step>
bool wait_at_most(Clock::duration limit, Done done, Step step) {
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (done()) return true;
      step();
    }
  } while (Clock::now() < end);
  return done();
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

void Gate::sleep(uint32_t seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Gate::wait(uint32_t seen, bool yield) {
  const auto done = [&] { return changed(seen); };
  if (wait_at_most(kSpin, done, pause)) return;
  if (yield && wait_at_most(kYield, done, [] { std::this_thread::yield(); })) return;
  sleep(seen);
}

Team::Team(int num_threads, bool pin) : num_threads_(std::max(1, num_threads)) {
  if (pin) cpus_ = allowed_cpus();
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

void Team::pin_to_cpu(int thread) const {
  if (cpus_.empty()) return;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus_[thread % cpus_.size()], &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // only a hint: failure is harmless
#else
  (void)thread;
#endif
}

void Team::worker(int thread) {
  pin_to_cpu(thread);
  // Start gates are counted from 0 and each job ends with a barrier, so none can be missed.
  for (uint32_t job = 0;; ++job) {
    start_.wait(job, /*yield=*/false);
    if (stopping_) return;
    body_(thread);
    barrier();
  }
}

void Team::run_body(TeamBody body) {
  std::lock_guard<std::mutex> turn(turn_);
  thread_local const Team* pinned_by = nullptr;
  if (pinned_by != this) {
    pin_to_cpu(0);
    pinned_by = this;
  }
  next_.store(0, std::memory_order_relaxed);
  if (num_threads_ == 1) return body(0);
  body_ = body;
  start_.advance();
  body(0);
  barrier();
}

void Team::barrier() {
  if (num_threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads_) {
    phase_.wait(phase, /*yield=*/true);
    return;
  }
  arrived_.store(0, std::memory_order_relaxed);
  next_.store(0, std::memory_order_relaxed);
  phase_.advance();
}

}  // namespace quire

extern "C" {

quire::Team* quire_team_create(int num_threads, int pin) {
  return new quire::Team(num_threads, pin != 0);
}

void quire_team_destroy(quire::Team* team) { delete team; }

int quire_team_size(const quire::Team* team) { return team->size(); }
}
