#include "pool.h"

#include <chrono>
#include <memory>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace qspec {
namespace {

// Between two steps the caller samples a token, which takes some 100 microseconds; waking a parked
// thread costs tens of them.
constexpr auto kSpin = std::chrono::microseconds(200);
// A partner that is late by more than this has probably lost its core: give it ours.
constexpr int kPausesBeforeYield = 1000;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

std::unique_ptr<Pool> the_pool;
int wanted_threads = 1;

// Threads do not survive a fork: the child forgets the pool without joining what it does not have.
void forget_pool() { (void)the_pool.release(); }

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads) {
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

Pool::~Pool() {
  is_closing_.store(true);
  {
    std::lock_guard<std::mutex> lock(sleep_);
    job_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::start(Call call, void* context) {
  std::lock_guard<std::mutex> turn(turn_);
  if (num_threads_ == 1) return call(context, 0);
  call_ = call;
  context_ = context;
  // Sequentially consistent, as in await_job: either we see the sleeper or it sees the job.
  job_.fetch_add(1);
  if (num_sleeping_.load() > 0) {
    { std::lock_guard<std::mutex> lock(sleep_); }
    wake_.notify_all();
  }
  call(context, 0);
  barrier();
}

void Pool::barrier() {
  if (num_threads_ == 1) return;
  const uint32_t seen = generation_.load(std::memory_order_acquire);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    num_arrived_.store(0, std::memory_order_relaxed);
    generation_.store(seen + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
    if (spins < kPausesBeforeYield) pause();
    else std::this_thread::yield();
  }
}

bool Pool::await_job(uint32_t seen) {
  const auto limit = std::chrono::steady_clock::now() + kSpin;
  for (int spins = 0; job_.load(std::memory_order_acquire) == seen; ++spins) {
    pause();
    if (spins % 64 == 63 && std::chrono::steady_clock::now() > limit) {
      std::unique_lock<std::mutex> lock(sleep_);
      num_sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return job_.load() != seen; });
      num_sleeping_.fetch_sub(1);
      break;
    }
  }
  return !is_closing_.load();
}

void Pool::work(int thread) {
  for (uint32_t seen = 0; await_job(seen); ++seen) {
    call_(context_, thread);
    barrier();
  }
}

Pool& pool() {
  if (!the_pool) {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    the_pool = std::make_unique<Pool>(wanted_threads);
  }
  return *the_pool;
}

void set_num_threads(int num_threads) {
  wanted_threads = num_threads;
  the_pool.reset();
}

}  // namespace qspec
