// A launch of one kernel on a CPU. Macros: SOURCE, the file with the kernel; KERNEL, its name.

#pragma once
#include "host.h"

#include <utility>

// A kernel: how a thread calls it, with the addresses of its arguments, and where a block's variables lie.
struct Kernel {
  void (*call)(void** args);
  void** args;
  u8* (*statics)();
};

// Returns why it failed, or null.
const char* run(const Kernel& kernel, const int* grid, int num_threads, size_t shared_bytes, int cluster,
                int cooperative, u32 seed);

#ifdef SOURCE
#include SOURCE

alignas(64) static thread_local u8 among_statics;  // of the kernel's own library

template <class... Args, size_t... I>
static void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<Args>*)args[I]...);
}

template <class... Args>
static void call(void (*kernel)(Args...), void** args) {
  call(kernel, args, std::index_sequence_for<Args...>());
}

// `args` are the addresses of a kernel's arguments. Returns why it failed, or null.
extern "C" const char* emulate(void** args, const int* grid, int num_threads, size_t shared_bytes,
                               int cluster, int cooperative, u32 seed) {
  const Kernel kernel = {[](void** all) { call(KERNEL, all); }, args, []() { return &among_statics; }};
  return run(kernel, grid, num_threads, shared_bytes, cluster, cooperative, seed);
}
#endif
