// Warpgroup products (sm_90a): 64 rows x 32 to 256 tokens, A in registers, B in shared memory.
//
// Warp w of the warpgroup holds rows 16 w to 16 w + 15 of A as the fragments of mma.m16n8k16 (bf16) or
// m16n8k32 (bytes); a lane's accumulators are those of the same instruction for every tile of 8 tokens,
// and so are the sums, bit for bit. Registers of A and of accumulators belong to the product from
// `wgmma_begin` to the wait that covers it.

#pragma once
#include "ptx.cuh"

// How operand B is described: rows of 128 bytes, swizzled by 128; the next 8 rows lie 1024 bytes on.
// These are the low 32 bits; `bytes` further on is `bytes / 16` more, and the high ones are constant.
DEVICE u32 x_descriptor(u32 at) { return at >> 4 | 1 << 16; }
#define DESCRIPTOR_HIGH "0x40000040"

// Operands are complete here: put before `wgmma_begin`, past which the compiler may not move them.
DEVICE void settle(u32 (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));
}

DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most LEFT committed groups are in flight.
template <int LEFT>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Lanes that issued a product together and have taken no branch since are at the same instruction: what any of them
// read before, all have. No instruction says so: __syncwarp, which promises it, costs drafts of 96 tokens spilled
// registers in the loop over tiles.
DEVICE void converged() {}

// barrier_wait as one piece of assembly: with a loop around it the compiler takes what follows for
// divergent, and keeps warpgroup products from overlapping (ptxas, C7520).
DEVICE void barrier_wait_whole(u32 bar, u32 parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done: }" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// Registers that each thread of a warpgroup keeps of those it was launched with, and what it may have then.
template <int LEFT>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LEFT));
}

template <int ALL>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ALL));
}

#define TILE_1(k, d, n) k(d[n][0]), k(d[n][1]), k(d[n][2]), k(d[n][3])
#define TILES_4(k, d, n) TILE_1(k, d, n), TILE_1(k, d, n + 1), TILE_1(k, d, n + 2), TILE_1(k, d, n + 3)
#define TILES_5(k, d, n) TILES_4(k, d, n), TILE_1(k, d, n + 4)
#define TILES_6(k, d, n) TILES_5(k, d, n), TILE_1(k, d, n + 5)
#define TILES_8(k, d, n) TILES_4(k, d, n), TILES_4(k, d, n + 4)
#define TILES_10(k, d, n) TILES_8(k, d, n), TILE_1(k, d, n + 8), TILE_1(k, d, n + 9)
#define TILES_12(k, d, n) TILES_8(k, d, n), TILES_4(k, d, n + 8)
#define TILES_16(k, d, n) TILES_8(k, d, n), TILES_8(k, d, n + 8)
#define TILES_20(k, d, n) TILES_16(k, d, n), TILES_4(k, d, n + 16)
#define TILES_24(k, d, n) TILES_16(k, d, n), TILES_8(k, d, n + 16)
#define TILES_32(k, d, n) TILES_16(k, d, n), TILES_16(k, d, n + 16)
#define LIST_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_20 LIST_16 ",%16,%17,%18,%19"
#define LIST_24 LIST_20 ",%20,%21,%22,%23"
#define LIST_32 LIST_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_40 LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define LIST_48 LIST_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST_64 LIST_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST_80 LIST_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LIST_96                                                                                    \
  LIST_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST_128                                                                                   \
  LIST_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113" \
          ",%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FLOAT_NEW(r) "=&f"(r)
#define FLOAT_SUM(r) "+f"(r)
#define INT_NEW(r) "=&r"(r)
#define INT_SUM(r) "+r"(r)

// d = A B, or d += A B (KEEP), and `hold`: the compiler must not read d before the wait above it.
#define WGMMA(KIND, TILES, SHAPE, LIST, A0, A1, A2, A3, B, KEEP, TAIL)                             \
  asm volatile("{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, " KEEP ", 0;\n"                        \
               "mov.b64 b, {" B ", " DESCRIPTOR_HIGH "};\n"                                         \
               "wgmma.mma_async.sync.aligned." SHAPE " {" LIST "}, {" A0 "," A1 "," A2 "," A3      \
               "}, b, p" TAIL "; }"                                                                  \
               : TILES_##TILES(KIND, d, 0)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b))
#define DEFINE_WGMMA(NAME, TYPE, KIND, TILES, SHAPE, LIST, A0, A1, A2, A3, B, TAIL)                \
  template <bool KEEP>                                                                             \
  DEVICE void NAME(TYPE (&d)[TILES][4], const u32 (&a)[4], u32 b) {                                \
    if (KEEP) WGMMA(KIND##_SUM, TILES, SHAPE, LIST, A0, A1, A2, A3, B, "1", TAIL);                 \
    else WGMMA(KIND##_NEW, TILES, SHAPE, LIST, A0, A1, A2, A3, B, "0", TAIL);                      \
  }
#define DEFINE_HOLD(TYPE, KIND, TILES)                                                             \
  DEVICE void hold(TYPE (&d)[TILES][4]) { asm volatile("" : TILES_##TILES(KIND##_SUM, d, 0)::"memory"); }

// 16 columns of bf16
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 4, "m64n32k16.f32.bf16.bf16", LIST_16, "%16", "%17", "%18",
             "%19", "%20", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 5, "m64n40k16.f32.bf16.bf16", LIST_20, "%20", "%21", "%22",
             "%23", "%24", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 6, "m64n48k16.f32.bf16.bf16", LIST_24, "%24", "%25", "%26",
             "%27", "%28", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 8, "m64n64k16.f32.bf16.bf16", LIST_32, "%32", "%33", "%34",
             "%35", "%36", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 10, "m64n80k16.f32.bf16.bf16", LIST_40, "%40", "%41", "%42",
             "%43", "%44", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 12, "m64n96k16.f32.bf16.bf16", LIST_48, "%48", "%49", "%50",
             "%51", "%52", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 16, "m64n128k16.f32.bf16.bf16", LIST_64, "%64", "%65", "%66",
             "%67", "%68", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 20, "m64n160k16.f32.bf16.bf16", LIST_80, "%80", "%81", "%82",
             "%83", "%84", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 24, "m64n192k16.f32.bf16.bf16", LIST_96, "%96", "%97", "%98",
             "%99", "%100", ", 1, 1, 0")
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 32, "m64n256k16.f32.bf16.bf16", LIST_128, "%128", "%129",
             "%130", "%131", "%132", ", 1, 1, 0")
// 32 columns of bytes
DEFINE_WGMMA(wgmma_s8, int, INT, 4, "m64n32k32.s32.s8.s8", LIST_16, "%16", "%17", "%18", "%19",
             "%20", "")
DEFINE_WGMMA(wgmma_u8s8, int, INT, 4, "m64n32k32.s32.u8.s8", LIST_16, "%16", "%17", "%18", "%19",
             "%20", "")
DEFINE_WGMMA(wgmma_s8, int, INT, 6, "m64n48k32.s32.s8.s8", LIST_24, "%24", "%25", "%26", "%27",
             "%28", "")
DEFINE_WGMMA(wgmma_u8s8, int, INT, 6, "m64n48k32.s32.u8.s8", LIST_24, "%24", "%25", "%26", "%27",
             "%28", "")
DEFINE_HOLD(float, FLOAT, 4)
DEFINE_HOLD(float, FLOAT, 5)
DEFINE_HOLD(float, FLOAT, 6)
DEFINE_HOLD(float, FLOAT, 8)
DEFINE_HOLD(float, FLOAT, 10)
DEFINE_HOLD(float, FLOAT, 12)
DEFINE_HOLD(float, FLOAT, 16)
DEFINE_HOLD(float, FLOAT, 20)
DEFINE_HOLD(float, FLOAT, 24)
DEFINE_HOLD(float, FLOAT, 32)
DEFINE_HOLD(int, INT, 4)
DEFINE_HOLD(int, INT, 6)
