// Warpgroup products (sm_90a): 64 rows x NT * 8 tokens, A in registers, B in shared memory.
//
// A lane's accumulators are those of mma.m16n8k16 for each tile of 8 tokens, and so are the sums, bit
// for bit (tests/kernels/test_cuda.py compares numbers of rows on either side of the change).

#pragma once
#include "ptx.cuh"

#define TILE_OUT(k, d, n) k(d[n][0]), k(d[n][1]), k(d[n][2]), k(d[n][3])
#define TILES_OUT_4(k, d, n) \
  TILE_OUT(k, d, n), TILE_OUT(k, d, n + 1), TILE_OUT(k, d, n + 2), TILE_OUT(k, d, n + 3)
#define LIST_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_32 LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_64                                                                                    \
  LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"  \
          "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#if NT == 4
#define WIDTH "32"
#define LIST LIST_16
#define ALL_OUT(k, d) TILES_OUT_4(k, d, 0)
#define LIST_A "%16,%17,%18,%19"
#define OPERAND_B "%20"
#define OPERAND_KEEP "%21"
#elif NT == 8
#define WIDTH "64"
#define LIST LIST_32
#define ALL_OUT(k, d) TILES_OUT_4(k, d, 0), TILES_OUT_4(k, d, 4)
#define LIST_A "%32,%33,%34,%35"
#define OPERAND_B "%36"
#define OPERAND_KEEP "%37"
#elif NT == 16
#define WIDTH "128"
#define LIST LIST_64
#define ALL_OUT(k, d) \
  TILES_OUT_4(k, d, 0), TILES_OUT_4(k, d, 4), TILES_OUT_4(k, d, 8), TILES_OUT_4(k, d, 12)
#define LIST_A "%64,%65,%66,%67"
#define OPERAND_B "%68"
#define OPERAND_KEEP "%69"
#endif
#define FLOAT_OUT(r) "+f"(r)
#define INT_OUT(r) "+r"(r)

// Rows of 128 bytes, swizzled by 128: the next 8 rows lie 1024 bytes on.
DEVICE u64 x_descriptor(u32 at) {
  return (u64)((at >> 4) & 0x3FFF) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// d = A B + (keep ? d : 0), 16 columns
DEVICE void wgmma_bf16(float (&d)[NT][4], const u32 (&a)[4], u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, " OPERAND_KEEP ", 0;\n"
      "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32.bf16.bf16 {" LIST "}, {" LIST_A
      "}, " OPERAND_B ", p, 1, 1, 0; }"
      : ALL_OUT(FLOAT_OUT, d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}

// 32 columns of u8 times s8
DEVICE void wgmma_u8s8(int (&d)[NT][4], const u32 (&a)[4], u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, " OPERAND_KEEP ", 0;\n"
      "wgmma.mma_async.sync.aligned.m64n" WIDTH "k32.s32.u8.s8 {" LIST "}, {" LIST_A
      "}, " OPERAND_B ", p; }"
      : ALL_OUT(INT_OUT, d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}

// The compiler must not read accumulators before the wait above this.
DEVICE void hold(float (&d)[NT][4]) {
  asm volatile("" : ALL_OUT(FLOAT_OUT, d)::"memory");
}

DEVICE void hold(int (&d)[NT][4]) { asm volatile("" : ALL_OUT(INT_OUT, d)::"memory"); }
