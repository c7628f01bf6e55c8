// Launches on a CPU, compiled once: blocks as threads, and who has its turn. launch.h is a kernel's side of it.

#include "launch.h"

constexpr int MOST_IDLE = 10000;    // turns in which nobody can go on
constexpr int TURNS_OF_SLOW = 128;  // and warp, until another one falls behind
constexpr auto MOST_DELAY = std::chrono::microseconds(2000);  // of a block after others that run with it
constexpr auto MOST_SECONDS = std::chrono::seconds(60);       // of a launch

thread_local Block* this_emulated_block;
thread_local Fiber* this_fiber;
thread_local void* scheduler_stack_pointer;
static thread_local const Kernel* kernel_of_block;

// Saves the registers that a call preserves, and goes on where those of the other stack were saved.
extern "C" void change_over(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
change_over:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
constexpr int NUM_SAVED = 6;
#else
#error "fibres change over by x86-64 instructions"
#endif

void look_again() { change_over(&this_fiber->stack_pointer, scheduler_stack_pointer); }

void fail(const char* why) {
  const Block& block = *this_emulated_block;
  block.launch->fail(why + (" (block " + std::to_string(block.index[0])) + ", thread " +
                     std::to_string(this_fiber->thread) + ")");
  while (true) look_again();
}

void meet(int name, size_t count, All* all, const void* what) {
  std::vector<Fiber*>& there = this_emulated_block->meetings[name];
  there.push_back(this_fiber);
  if (there.size() < count) {
    this_fiber->waits = true;
    look_again();
    return;
  }
  std::vector<Fiber*> met;
  met.swap(there);
  if (all) all(what, met);
  for (Fiber* fiber : met) fiber->waits = false;
}

struct Together {
  void (*call)(const void*, Fiber**);
  const void* what;
};

void meet_warp(void (*together)(const void* what, Fiber** lanes), const void* what) {
  const Together last = {together, what};
  const auto all = [](const void* one, std::vector<Fiber*>& met) {
    Fiber* lanes[32];
    for (Fiber* fiber : met) lanes[fiber->thread % 32] = fiber;
    ((const Together*)one)->call(((const Together*)one)->what, lanes);
  };
  meet(WARPS_FROM + this_fiber->thread / 32, 32, all, &last);
}

void __syncthreads() { meet(ALL_OF_BLOCK, this_emulated_block->fibers.size()); }

static void run_fiber() {
  kernel_of_block->call(kernel_of_block->args);
  this_fiber->is_done = true;
  look_again();
}

static void start_fiber(Fiber& fiber, int thread) {
  fiber.thread = thread;
  fiber.stack.reset(new u64[STACK / 8]);
  u64* top = fiber.stack.get() + STACK / 8;
  top -= (size_t)top / 8 % 2;  // as after a call
  *--top = 0;
  *--top = (u64)&run_fiber;
  fiber.stack_pointer = top - NUM_SAVED;
}

static void deliver(const BulkCopy& copy) {
  copy.arrive();
  if (copy.block->has_ended) copy.block->launch->fail("a copy into a block that has ended");
}

static void let_one_arrive(Block& block) {
  if (block.bulk_copies.empty()) return;
  BulkCopy& drawn = block.bulk_copies[block.draw() % block.bulk_copies.size()];
  if (drawn.is_late) {
    std::lock_guard<std::mutex> lock(drawn.block->barriers_mutex);
    if (!drawn.block->barriers[drawn.barrier].is_awaited) return;
  }
  std::swap(drawn, block.bulk_copies.back());
  const BulkCopy copy = std::move(block.bulk_copies.back());
  block.bulk_copies.pop_back();
  deliver(copy);
}

static void compare_products(Block& block) {
  for (const auto& [warp, products] : block.products) {
    for (int mate = warp / 4 * 4; mate < warp / 4 * 4 + 4; mate++) {
      const auto found = block.products.find(mate);
      if (found == block.products.end() || found->second.issued != products.issued)
        block.launch->fail("a warpgroup whose warps have not issued the same products");
    }
    if (!products.under_way.empty()) block.launch->fail("products that nobody has waited for");
  }
}

// Runs a warp until it waits, warp after warp, and now and then lets a bulk copy arrive. One warp seldom has its
// turn, so that it is as far behind the others as these let it be.
static void run_block(Block& block) {
  Launch& launch = *block.launch;
  this_emulated_block = &block;
  block.statics = kernel_of_block->statics();
  block.fibers = std::vector<Fiber>(launch.num_threads);
  for (int i = 0; i < launch.num_threads; i++) start_fiber(block.fibers[i], i);
  if (launch.at_a_time > 1) std::this_thread::sleep_for(block.draw() % 1000 * MOST_DELAY / 1000);
  const auto end = std::chrono::steady_clock::now() + MOST_SECONDS;
  const int num_warps = launch.num_threads / 32;
  int left = launch.num_threads, idle = 0, slow = block.draw() % num_warps;
  for (u64 turn = 1; left && !launch.has_failed; turn++) {
    if (turn % 64 == 0) {
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > end) launch.fail("it hangs");
    }
    if (block.draw() % 3 == 0) let_one_arrive(block);
    if (++idle > MOST_IDLE && block.bulk_copies.empty()) launch.fail("all wait for what never comes");
    if (turn % (TURNS_OF_SLOW * num_warps) == 0) slow = block.draw() % num_warps;
    int warp = block.draw() % num_warps;
    if (warp == slow && block.draw() % 8) warp = block.draw() % num_warps;
    const int first = block.draw() % 32;
    for (int i = 0; i < 32; i++) {
      this_fiber = &block.fibers[warp * 32 + (first + i) % 32];
      if (this_fiber->is_done || this_fiber->waits) continue;
      idle = 0;
      change_over(&scheduler_stack_pointer, this_fiber->stack_pointer);
      left -= this_fiber->is_done;
    }
  }
  block.has_ended = true;
  for (const BulkCopy& copy : block.bulk_copies) deliver(copy);
  if (!launch.has_failed) compare_products(block);
}

// Blocks first to first + count of the grid, all at a time, in clusters.
static void run_blocks(Launch& launch, int first, int count, size_t shared_bytes, u32 seed,
                       const Kernel& kernel) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::vector<Block*>> clusters(count / launch.cluster);
  std::vector<std::atomic<int>> arrivals(clusters.size());
  for (int i = 0; i < count; i++) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    const int at = first + i;
    block.launch = &launch;
    block.index[0] = at % launch.grid[0];
    block.index[1] = at / launch.grid[0] % launch.grid[1];
    block.index[2] = at / launch.grid[0] / launch.grid[1];
    block.rank = i % launch.cluster;
    block.cluster = &clusters[i / launch.cluster];
    block.cluster->push_back(&block);
    block.cluster_arrivals = &arrivals[i / launch.cluster];
    block.draw.seed(seed + at);
    block.shared_bytes = shared_bytes;
    block.memory.assign(shared_bytes + 1024, 0xFF);  // NaN, whatever it is read as
    block.shared = block.memory.data() + (1024 - (size_t)block.memory.data() % 1024) % 1024;
  }
  std::vector<std::thread> threads;
  for (const auto& block : blocks) {
    threads.emplace_back([&]() {
      kernel_of_block = &kernel;
      run_block(*block);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

const char* run(const Kernel& kernel, const int* grid, int num_threads, size_t shared_bytes, int cluster,
                int cooperative, u32 seed) {
  static std::string failure;
  Launch launch;
  for (int i = 0; i < 3; i++) launch.grid[i] = grid[i];
  launch.num_threads = num_threads, launch.cluster = cluster;
  const int all = grid[0] * grid[1] * grid[2];
  launch.at_a_time = cooperative ? all : cluster;
  for (int first = 0; first < all && !launch.has_failed; first += launch.at_a_time)
    run_blocks(launch, first, launch.at_a_time, shared_bytes, seed, kernel);
  failure = launch.failure;
  return launch.has_failed ? failure.c_str() : nullptr;
}
