// Thread team: the engine's own threads, kept inside one job from its first operation to its last.
//
//   caller            worker 1 .. N-1
//   run(body) ------> wake (spinning, or asleep when idle for longer than ~50 us)
//   body(0)           body(1) .. body(N-1)        all threads run the same body
//     claim, barrier    claim, barrier            any number of times
//   returns <-------- finished, spin ~50 us, then sleep: an idle engine uses no CPU
//
// A job is one call of `run`. Inside it `claim` hands out work in chunks by one shared counter, and
// `barrier` waits for everyone and starts the count anew. `parallel_for` is a whole job in one call.
// Results must not depend on which thread does what: the kernels give each output element to one
// thread and reduce in an order fixed by the data alone.

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

// A number that one thread advances and others wait to see change. A waiter spins, then yields
// (another process may hold the core that the awaited thread needs), then sleeps.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  // Returns once value() != seen. `yield` false goes straight from spinning to sleeping.
  void wait(uint32_t seen, bool yield);

 private:
  bool changed(uint32_t seen) const { return value() != seen; }
  void sleep(uint32_t seen);

  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A reference to a callable `void(int thread)`; the callable must outlive the call. (std::function
// would allocate.)
class TeamBody {
 public:
  template <class F>
  TeamBody(F& f) : object_(&f), call_([](void* o, int thread) { (*static_cast<F*>(o))(thread); }) {}
  TeamBody() = default;
  void operator()(int thread) const { call_(object_, thread); }

 private:
  void* object_ = nullptr;
  void (*call_)(void*, int) = nullptr;
};

class Team {
 public:
  // `num_threads` counts the caller of `run`, which is thread 0. With `pin`, threads stay on one
  // CPU each of those the process may use; a calling thread is pinned by its first `run`.
  Team(int num_threads, bool pin);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return num_threads_; }

  // Runs body(thread) on every thread of the team and returns when all are done. Calls from
  // several threads take turns. Not reentrant: a body must not call `run` or `parallel_for`.
  template <class F>
  void run(F&& body) {
    run_body(TeamBody(body));
  }

  // Inside a job: waits until every thread is here; then `claim` starts again at 0.
  void barrier();

  // Inside a job: the first of `grain` consecutive indices that nobody else gets in this phase.
  // Stop when it is past the end of the work.
  int64_t claim(int64_t grain) { return next_.fetch_add(grain, std::memory_order_relaxed); }

  // A whole job: body(begin, end) over chunks of [0, n) of at most `grain` (>= 1) indices. Runs on
  // the caller alone where one chunk is all there is.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, F&& body) {
    if (n <= grain || num_threads_ == 1) {
      if (n > 0) body(int64_t{0}, n);
      return;
    }
    run([&](int) {
      for (int64_t begin = claim(grain); begin < n; begin = claim(grain)) {
        body(begin, std::min(begin + grain, n));
      }
    });
  }

 private:
  void run_body(TeamBody body);
  void worker(int thread);
  void pin_to_cpu(int thread) const;

  const int num_threads_;
  std::vector<int> cpus_;  // empty: not pinned
  std::mutex turn_;
  TeamBody body_;
  bool stopping_ = false;
  Gate start_;
  Gate phase_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  std::vector<std::thread> workers_;
};

}  // namespace quire

extern "C" {
// The same as C ABI, for ctypes and for libraries that take a team by handle.
quire::Team* quire_team_create(int num_threads, int pin);
void quire_team_destroy(quire::Team* team);
int quire_team_size(const quire::Team* team);
}
