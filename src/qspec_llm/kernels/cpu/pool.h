// A team of threads for jobs of microseconds: workers spin for the next job, then park.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
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

// Hands out pieces of a range to whoever comes next, so that a thread that the system takes away
// for a while does not hold up the others. One for each parallel loop between two jobs.
struct alignas(64) Queue {
  std::atomic<int64_t> next{0};

  template <class F>
  void each(int64_t total, int64_t piece, F&& work) {
    for (;;) {
      const int64_t first = next.fetch_add(piece, std::memory_order_relaxed);
      if (first >= total) return;
      work(first, first + piece < total ? first + piece : total);
    }
  }
};

// The one pool of the process; made anew after a fork and by set_num_threads.
Pool& pool();
void set_num_threads(int num_threads);

// Ask for large pages under memory that was not written yet; does nothing where there are none.
void advise_huge_pages(void* memory, int64_t size);

}  // namespace qspec
