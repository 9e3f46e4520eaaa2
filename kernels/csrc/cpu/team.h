// Thread team: the engine's own threads, kept inside one job from its first operation to its last.
//
//   caller               worker 1 .. N-1
//   run(phases, job) --> wake (spinning, or asleep when idle for longer than ~100 us)
//   phase 0: items       phase 0: items        each thread claims items until none are left,
//   phase 1: items       phase 1: items        then waits until all of the phase are done
//   ...                  ...
//   returns              leave, spin ~100 us, then sleep: an idle engine uses no CPU
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
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};

  // Takes the next items; false when none are left. Claims shrink towards the end of the phase, so
  // that threads finish together and early claims stream long spans.
  bool claim(int num_threads, int64_t& begin, int64_t& end);
  // Counts finished items; true for whoever finishes the last.
  bool finish(int64_t count) {
    return done.fetch_add(count, std::memory_order_acq_rel) + count == items;
  }
  bool finished() const { return done.load(std::memory_order_acquire) == items; }
};

class Job {
 public:
  virtual ~Job() = default;
  // Items [begin, end) of a phase, on thread 0 .. size() - 1.
  virtual void run(int64_t phase, int64_t begin, int64_t end, int thread) = 0;
  // All of a phase is done, seen by the caller's thread.
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

  // Runs the phases in order and returns when all are done. Sets `next` and `done` itself. Calls
  // from several threads take turns; a job must not call back into the team. `phases` and `job` may
  // be reused at once but must outlive the call by `settle`.
  void run(Phase* phases, int64_t num_phases, Job& job);

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
      void run(int64_t, int64_t begin, int64_t end, int) override { f(begin, end); }
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
  bool claim_and_run(int64_t phase, int thread);
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
  alignas(64) std::atomic<int> inside_{0};  // workers that may be looking at the job
  Gate start_;
  Gate progress_;  // a phase is done
  Gate left_;
  std::vector<std::thread> workers_;
};

}  // namespace quire

extern "C" {
// The same as C ABI, for ctypes and for libraries that take a team by handle.
quire::Team* quire_team_create(int num_threads, int pin);
void quire_team_destroy(quire::Team* team);
int quire_team_size(const quire::Team* team);
}
