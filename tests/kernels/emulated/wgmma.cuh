// What stands for kernels/cuda/wgmma.cuh on a CPU: the same functions.
//
// A product reads its operands, and writes its sums, at a drawn time from its issue to the wait that covers it, most
// often at the end. The variables of operand A must live, and keep their values, as long. Sums are kept apart: the
// variables that stand for them hold no number until `hold`, which fails before that wait.
//
// Each warp does its 16 rows by itself, as far ahead of the other three as it may come; that all four have issued
// the same products is looked at when the block has ended.

#pragma once
#include "ptx.cuh"

constexpr u32 NO_SUM = 0x7FBADBAD;  // NaN, and as an integer larger than any sum

DEVICE u32 x_descriptor(u32 at) {
  if (at % 1024) fail("a swizzled operand that does not begin at a multiple of 1024 bytes");
  return at >> 4 | 1 << 16;
}

DEVICE void settle(u32 (&)[4]) {}

void wgmma_begin();
void wgmma_commit();
void wait_for_products(int most_left);  // groups of them

template <int LEFT>
DEVICE void wgmma_wait() { wait_for_products(LEFT); }

DEVICE void converged() { __syncwarp(); }

DEVICE void barrier_wait_whole(u32 bar, u32 parity) { barrier_wait(bar, parity); }

template <int LEFT>
DEVICE void give_registers() {}
template <int ALL>
DEVICE void take_registers() {}

// d = a b, or d += a b, of a warp's 16 rows and 8 tokens a tile; `kind` is of operand A and B.
enum class Values { bf16, s8, u8s8 };
void warpgroup_product(Values kind, void* d, int tiles, const u32 (&a)[4], u32 b, bool keeps);

template <bool KEEP, int TILES>
DEVICE void wgmma_bf16(float (&d)[TILES][4], const u32 (&a)[4], u32 b) {
  warpgroup_product(Values::bf16, d, TILES, a, b, KEEP);
}

template <bool KEEP, int TILES>
DEVICE void wgmma_s8(int (&d)[TILES][4], const u32 (&a)[4], u32 b) {
  warpgroup_product(Values::s8, d, TILES, a, b, KEEP);
}

template <bool KEEP, int TILES>
DEVICE void wgmma_u8s8(int (&d)[TILES][4], const u32 (&a)[4], u32 b) {
  warpgroup_product(Values::u8s8, d, TILES, a, b, KEEP);
}

// The sums of products are read, or written otherwise, from here on.
void hold_sums(void* d, size_t bytes);

template <class Sum, int TILES>
inline void hold(Sum (&d)[TILES][4]) { hold_sums(d, sizeof d); }
