// Thread team: the engine's own threads, kept inside one job from its first operation to its last.
//
//   caller               worker 1 .. N-1
//   run(phases, job) --> wake (spinning, or asleep when idle for longer than ~100 us)
//   phase 0: items       phase 0: items        each thread claims items until none are left,
//   phase 1: items       phase 1: items        then waits until all of the phase are done
//   ...                  ...
//   returns              leave, spin ~100 us, then sleep: an idle engine uses no CPU
//
// Of each phase a thread has a share of its own, [items t / N, items (t + 1) / N), which it takes from
// the front: it reads a long span in order, and in the next job the same one. Whoever has no more
// takes from the back of the others' shares.
//
// What is waited for is work, not threads: a thread that the system has put aside, or that is still
// waking up, holds nobody up unless it is inside an item. On a machine that other processes share
// (the gateway beside the engine on two cores), a barrier of all threads would cost a time slice
// whenever one of them is not running.
//
// Results must not depend on which thread does what: a job gives each output element to one item
// and reduces in an order fixed by the data alone.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

// A number that advances, and that others wait to see change: they spin, then sleep.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  // Returns once value() != seen.
  void wait(uint32_t seen);

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Work that may be done in any order and by any thread, before the next phase starts.
struct Phase {
  int64_t items = 0;
  int64_t largest_claim = 0;  // items a thread takes at once; 0: as many as balance well
};

// Where the share of a thread begins; `thread` may be the number of threads.
inline int64_t share_begin(int64_t items, int thread, int num_threads) {
  return items * thread / num_threads;
}

// Whose share an item is of.
inline int share_owner(int64_t items, int64_t item, int num_threads) {
  auto thread = static_cast<int>(item * num_threads / items);
  while (item >= share_begin(items, thread + 1, num_threads)) ++thread;
  return thread;
}

// Items [begin, end) of a phase.
struct Claim {
  int64_t phase;
  int64_t begin;
  int64_t end;
};

// What is left of a thread's share of the phase that is under way. A number of one word, changed at
// once by whoever claims; it holds the phase, so that a thread that was put aside between two looks
// at it claims nothing of another phase by mistake.
class Share {
 public:
  static constexpr int64_t kMostPhases = int64_t{1} << 12;
  static constexpr int64_t kMostItems = int64_t{1} << 26;

  // Whoever claims sees what was written before.
  void deal(const Claim& items) { word_.store(pack(items), std::memory_order_release); }
  // Half of what is left, `most` (0: no limit) at most: the owner from the front, others from the
  // back. False when nothing is left.
  bool claim(bool is_owner, const Phase* phases, Claim& claim);

 private:
  static uint64_t pack(const Claim& items);
  static Claim unpack(uint64_t word);

  alignas(64) std::atomic<uint64_t> word_{0};
};

class Job {
 public:
  virtual ~Job() = default;
  // Computes a claim, on thread 0 .. size() - 1.
  virtual void run(const Claim& claim, int thread) = 0;
  // All of a phase is done, on the thread that did the last of it: phase after phase.
  virtual void phase_done(int64_t /*phase*/) {}
  // A thread is about to wait, or has nothing more to do.
  virtual void leave() {}
};

class Team {
 public:
  // `num_threads` counts the caller of `run`, which is thread 0. With `pin`, threads stay on one
  // CPU each of those the process may use; a calling thread is pinned by its first `run`. Without,
  // workers only keep off the CPU that the caller is on.
  Team(int num_threads, bool pin);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return num_threads_; }

  // Runs the phases in order and returns when all are done. Calls from several threads take turns;
  // a job must not call back into the team. `phases` and `job` may be reused at once but must
  // outlive the call by `settle`. Throws std::length_error beyond the limits of Share.
  void run(Phase* phases, int64_t num_phases, Job& job);

  // A job comes soon: workers that sleep are woken, which takes them longer than a short operation.
  void rouse();

  // Waits until no worker looks at the last job any more: at once, unless a worker has just been
  // put aside between two items. Workers that wait for a phase or for a job do not look at it.
  void settle();

  // One phase: body(begin, end) over chunks of [0, n) of at most `grain` (>= 1) indices. Runs on
  // the caller alone where one chunk is all there is.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, F&& body) {
    if (n <= grain || num_threads_ == 1) {
      if (n > 0) body(int64_t{0}, n);
      return;
    }
    struct Loop final : Job {
      explicit Loop(F& f) : f(f) {}
      void run(const Claim& claim, int) override { f(claim.begin, claim.end); }
      F& f;
    } loop(body);
    Phase phase;
    phase.items = n;
    phase.largest_claim = grain;
    run(&phase, 1, loop);
    settle();
  }

 private:
  void worker(int thread);
  bool enter(uint32_t job);
  void exit();
  void work(int thread, uint32_t job);
  bool claim(int thread, Claim& claim);
  void open_phase(int64_t phase);
  void wait_for_empty();
  void place_threads();

  const int num_threads_;
  const bool pin_;
  const std::vector<int> cpus_;  // that the process may use
  int caller_cpu_ = -1;          // that the workers keep off
  std::mutex turn_;
  Phase* phases_ = nullptr;
  int64_t num_phases_ = 0;
  Job* job_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::atomic<uint32_t> open_{0};  // number of the job that may be entered; 0: none
  const std::unique_ptr<Share[]> shares_;     // one per thread, of the phase under way
  std::atomic<int64_t> phase_{0};             // under way; the number of phases when all are done
  alignas(64) std::atomic<int64_t> done_{0};  // items of it
  alignas(64) std::atomic<int> inside_{0};  // workers that may be looking at the job
  Gate start_;
  Gate progress_;  // advances with `phase_`
  Gate left_;
  std::vector<std::thread> workers_;
};

}  // namespace quire

extern "C" {
// The same as C ABI, for ctypes and for libraries that take a team by handle.
quire::Team* quire_team_create(int num_threads, int pin);
void quire_team_destroy(quire::Team* team);
int quire_team_size(const quire::Team* team);
void quire_team_rouse(quire::Team* team);
}
