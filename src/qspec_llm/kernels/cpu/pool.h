// A team of threads for jobs of microseconds: workers spin for the next job, then park.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace qspec {

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return num_threads_; }

  // Call job(thread) on every thread, the caller being thread 0; returns when all have. Calls from
  // several threads take turns. A job must not throw.
  template <class F>
  void run(F&& job) {
    auto call = [](void* context, int thread) { (*static_cast<F*>(context))(thread); };
    start(call, &job);
  }

  // Inside a job: wait until every thread has come here.
  void barrier();

 private:
  using Call = void (*)(void*, int);
  void start(Call call, void* context);
  void work(int thread);
  bool await_job(uint32_t seen);  // false where the pool is closing

  const int num_threads_;
  std::vector<std::thread> workers_;
  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  // apart from each other: threads spin on them
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<bool> is_closing_{false};
};

// A range that the threads of a job share. Each takes its own part from end to end, so that what it
// reads is one stream of memory; whoever is done goes on with the parts of the others, so that a
// thread that the system takes away for a while does not hold them up. One for each parallel loop
// between two jobs.
class Shares {
 public:
  void reset(int num_threads) {
    if (num_threads != num_threads_) taken_ = std::make_unique<Taken[]>(num_threads);
    num_threads_ = num_threads;
    for (int i = 0; i < num_threads; ++i) taken_[i].pieces.store(0, std::memory_order_relaxed);
  }

  // Calls work(first, last) for pieces of [0, total) until none is left.
  template <class F>
  void each(int thread, int64_t total, int64_t piece, F&& work) {
    for (int i = 0; i < num_threads_; ++i) {
      const int owner = thread + i < num_threads_ ? thread + i : thread + i - num_threads_;
      const int64_t begin = start(owner, total), end = start(owner + 1, total);
      for (;;) {
        const int64_t taken = taken_[owner].pieces.fetch_add(1, std::memory_order_relaxed);
        const int64_t first = begin + piece * taken;
        if (first >= end) break;
        work(first, first + piece < end ? first + piece : end);
      }
    }
  }

 private:
  int64_t start(int thread, int64_t total) const { return total * thread / num_threads_; }

  struct alignas(64) Taken {
    std::atomic<int64_t> pieces{0};
  };
  std::unique_ptr<Taken[]> taken_;
  int num_threads_ = 0;
};

// The one pool of the process; made anew after a fork and by set_num_threads.
Pool& pool();
void set_num_threads(int num_threads);

}  // namespace qspec
