// CUDA's words on a CPU, so that kernels run, and are tested, where there is no GPU.
//
// A block is a thread of the system, its threads are fibres, which change over where a warp or a block meets,
// where a value of another block is awaited, and nowhere else. Which warp goes on, and which of its lanes
// first, is drawn, and copies arrive as late as they may or at once, also drawn: what is right only in one
// order fails with some seed.
//
// A launch ends with a sentence instead of a result where a kernel is wrong in a way that a GPU would not
// survive: an address outside of shared memory, a wait for what never comes, a trap. Nothing here is timed.

#pragma once
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local  // of a block, which is a thread

using std::max;
using std::min;

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Block;
struct Launch;

// ---- fibres --------------------------------------------------------------------------------------

constexpr size_t STACK = 96 << 10, NUM_OPERANDS = 20;

// Registers that warpgroup products sum up in, from the first product to `hold`; nothing else sees them.
struct Sums {
  std::vector<u32> words;
  int last_group;  // of products
};

struct Fiber {
  int thread;
  void* stack_pointer;
  std::unique_ptr<u64[]> stack;
  bool is_done = false, waits = false;
  int cluster_phase = 0;                                   // meetings of the cluster so far
  u64 operands[NUM_OPERANDS];                              // of what its warp does together
  std::vector<std::function<void()>> copies;               // not committed
  std::vector<std::vector<std::function<void()>>> groups;  // committed, not waited for
  std::map<const void*, Sums> sums;                        // by the place of what they stand for
};

// Warpgroup products of one warp, which are done in order: when they are waited for, or before.
struct Products {
  struct Product {
    int group;
    std::function<void()> compute;
  };
  struct Operand {
    int group;
    u32 from, to;  // shared addresses
  };
  bool has_begun = false;
  int num_committed = 0, num_awaited = 0;  // groups
  std::deque<Product> under_way;
  std::deque<Operand> operands;  // of products that are not waited for
  std::vector<u64> issued;       // what they were: all warps of a warpgroup issue the same

  void compute_first() {
    under_way.front().compute();
    under_way.pop_front();
  }

  void wait_for(int num_groups) {
    num_awaited = max(num_awaited, num_groups);
    while (!under_way.empty() && under_way.front().group < num_awaited) compute_first();
    while (!operands.empty() && operands.front().group < num_awaited) operands.pop_front();
  }

  bool may_read(u32 from, u32 to) const {
    for (const Operand& operand : operands)
      if (operand.from < to && from < operand.to) return true;
    return false;
  }
};

// An mbarrier.
struct Barrier {
  int arrivals = 0, missing = 0, phase = 0;
  long bytes = 0;
  bool is_awaited = false;

  void settle() {
    if (missing || bytes) return;
    phase++;
    missing = arrivals;
  }
};

// On its way into a block's shared memory.
struct BulkCopy {
  std::function<void()> arrive;
  Block* block;
  u32 barrier;   // which counts it
  bool is_late;  // it arrives when it is waited for
};

struct Block {
  Launch* launch;
  int index[3], rank;  // in the grid; in the cluster
  std::vector<Block*>* cluster;
  std::vector<u8> memory;  // dynamic shared memory
  u8* shared;              // its first aligned byte
  size_t shared_bytes;
  u8* statics;             // where addresses of shared memory that is not dynamic are counted from
  std::map<u32, size_t> static_sizes;  // of what has an address, in bytes
  std::vector<Fiber> fibers;
  std::mt19937 draw;
  std::map<int, std::vector<Fiber*>> meetings;
  std::vector<BulkCopy> bulk_copies;  // that this block asked for
  std::map<int, Products> products;   // by warp
  std::mutex barriers_mutex;          // other blocks of the cluster may copy into this one
  std::map<u32, Barrier> barriers;
  std::atomic<int>* cluster_arrivals;
  std::atomic<bool> has_ended{false};
};

struct Launch {
  int grid[3], num_threads, cluster, at_a_time;  // the last in blocks
  std::atomic<bool> has_failed{false};
  std::mutex mutex;
  std::string failure;

  void fail(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!has_failed) failure = why;
    has_failed = true;
  }
};

// Of run.cpp.
extern thread_local Block* this_emulated_block;
extern thread_local Fiber* this_fiber;
extern thread_local void* scheduler_stack_pointer;

// What `extern __shared__ T name[]` declares.
template <class T>
struct DynamicShared {
  operator T*() const { return (T*)this_emulated_block->shared; }
  template <class U>
  explicit operator U*() const { return (U*)this_emulated_block->shared; }
};

// Lets others go on; there is something to wait for.
void look_again();

// The kernel is wrong: this fibre goes on no more.
[[noreturn]] void fail(const char* why);

// Waits for `count` fibres that meet under one name; the last one does what all wait for.
using All = void(const void* what, std::vector<Fiber*>& met);
void meet(int name, size_t count, All* all = nullptr, const void* what = nullptr);

enum { ALL_OF_BLOCK = 1000, WARPS_FROM = 2000 };  // names of meetings; barriers have 0 to 15

// What a warp does together: `together` gets the fibres of its lanes.
void meet_warp(void (*together)(const void* what, Fiber** lanes), const void* what);

template <class Together>
inline void by_warp(const Together& together) {
  meet_warp([](const void* what, Fiber** lanes) { (*(const Together*)what)(lanes); }, &together);
}

template <int COUNT>
inline void meet_at(int barrier) { meet(barrier, COUNT); }

void __syncthreads();

inline void __syncwarp() { by_warp([](Fiber**) {}); }

struct Index { int x, y, z; };
#define threadIdx (Index{this_fiber->thread, 0, 0})
#define blockIdx \
  (Index{this_emulated_block->index[0], this_emulated_block->index[1], this_emulated_block->index[2]})
#define blockDim (Index{this_emulated_block->launch->num_threads, 1, 1})
#define gridDim \
  (Index{this_emulated_block->launch->grid[0], this_emulated_block->launch->grid[1], \
         this_emulated_block->launch->grid[2]})

// ---- functions of CUDA ---------------------------------------------------------------------------

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float __int_as_float(int v) { return bits_of<float>(v); }
inline float __uint_as_float(u32 v) { return bits_of<float>(v); }
inline int __float_as_int(float v) { return bits_of<int>(v); }
inline u32 __float_as_uint(float v) { return bits_of<u32>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define __expf expf  // which the C library has declared

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (int)(signed char)(a >> i) * (signed char)(b >> i);
  return c;
}

template <class T>
inline T __ldcs(const T* from) { return *from; }

template <class T>
inline T __ldcg(const T* from) { return *from; }
template <class T>
inline void __stcg(T* to, T value) { *to = value; }

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline u32 atomicAdd(u32* to, u32 value) { return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST); }
inline void __trap() { fail("a trap"); }

template <class T>
inline T shuffled(T value, int from) {
  this_fiber->operands[0] = bits_of<u32>(value);
  this_fiber->operands[1] = from & 31;
  by_warp([](Fiber** lanes) {
    for (int l = 0; l < 32; l++) lanes[l]->operands[2] = lanes[lanes[l]->operands[1]]->operands[0];
  });
  return bits_of<T>((u32)this_fiber->operands[2]);
}

#define __shfl_sync(mask, value, lane) shuffled(value, lane)
#define __shfl_xor_sync(mask, value, step) shuffled(value, this_fiber->thread ^ (int)(step))

inline int __reduce_add_sync(u32, int value) {
  this_fiber->operands[0] = (u32)value;
  by_warp([](Fiber** lanes) {
    u32 sum = 0;
    for (int l = 0; l < 32; l++) sum += (u32)lanes[l]->operands[0];
    for (int l = 0; l < 32; l++) lanes[l]->operands[1] = sum;
  });
  return (int)this_fiber->operands[1];
}
