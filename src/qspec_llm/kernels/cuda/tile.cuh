// What a tile of packed weights holds, and how codes become operands of the tensor cores.
//
// A tile is 16 rows x 128 columns (layout.py has the bytes). Lane l = 4 g + t of a warp owns rows g and
// g + 8 and, in step j of 16 columns, the columns 16 j + {2t, 2t + 1, 2t + 8, 2t + 9}: the A fragment
// of mma.m16n8k16. A word of q4 or r4 holds those eight codes: byte
// order 2t, 2t + 8, 2t + 1, 2t + 9, row g in the low nibbles and g + 8 in the high ones.
//
// Compile-time form of the tensor, as this view reads it:
//   BITS    0 dense bf16, 4 or 8 levels (a small integer, a scale, perhaps an offset), 16 exact bf16
//   SIGNED  the grid          GROUP       columns that share a scale
//   OFFSET  an offset is stored           SCALE_HALF  scales are float16, not bfloat16
//   MIDDLE  a 4-bit draft of an 8-bit affine tensor: it computes with the middle of the 16 codes

#pragma once
#include "ptx.cuh"

#define TILE_ROWS 16
#define TILE_COLS 128
#define LEVELS (BITS == 4 || BITS == 8)
#define GROUPS_PER_TILE (TILE_COLS / GROUP)

#if BITS == 0
#define BASE_BYTES 4096
#define REST_BYTES 0
#else
#define BASE_BYTES (1024 + 32 * GROUPS_PER_TILE * (1 + OFFSET))
#define REST_BYTES (BITS == 16 ? 3072 : BITS == 8 ? 1024 : 0)
#endif

// The level of the smallest code: u = code + r4's share counts from here.
#if SIGNED
#define ZERO_HIGH 7  // u = v + 7
#define ZERO_LOW 8   // V = 16 v + r4 - 8
#else
#define ZERO_HIGH (OFFSET ? 0 : 8)
#define ZERO_LOW 0
#endif
#define LEVEL_ZERO (BITS == 8 ? 16 * ZERO_HIGH + ZERO_LOW : ZERO_HIGH)
#define HAS_SHIFT (OFFSET || MIDDLE)  // the weight is not level * scale alone

// What is added to a row's sums, in a kernel's `Problem`: nothing (bias_kind 0), bf16 (1) or float32 (2).
template <class Problem>
DEVICE float bias_of(const Problem& p, int row) {
  if (p.bias_kind == 0) return 0.f;
  if (p.bias_kind == 1) return bf16_to_float(((const u16*)p.bias)[row]);
  return ((const float*)p.bias)[row];
}

// The same, and 0 for a row that does not exist.
template <class Problem>
DEVICE float bias_or_zero(const Problem& p, int row) {
  if (p.bias_kind == 0 || row >= p.num_rows) return 0.f;
  return bias_of(p, row);
}

// Offset of the 16 bytes of lane 0 in a plane of nibbles: [half of 64 columns][lane][16].
DEVICE u32 nibbles_at(int half) { return half * 512; }

// r8: [half][pair of steps][lane][16]; two words a step, row g and row g + 8, columns in order.
DEVICE u32 bytes_at(int half, int pair) { return 1024 + half * 1024 + pair * 512; }

// Dense: [half][step of 16 columns][lane][16], the four registers of an A fragment.
DEVICE u32 dense_at(int half, int step) { return (half * 4 + step) * 512; }

// Scale (which = 0) or offset (1) of one row.
DEVICE u32 scale_at(int group, int row, int which) {
  return 1024 + (which * GROUPS_PER_TILE + group) * 32 + row * 2;
}

DEVICE float scale_to_float(u32 bits) {
#if SCALE_HALF
  return half_to_float(bits);
#else
  return bf16_to_float(bits);
#endif
}

#if BITS != 0
// Scales, or offsets, that are spread over a warp's lanes as they lie in the tile: that of row `row` of the
// upper or the lower half, out of the lane that holds it.
DEVICE u32 from_lane_of(int row, int upper, int group, u32 plane) {
#if GROUP == 32
  const u32 pair = __shfl_sync(~0u, plane, group * 8 + upper * 4 + row / 2);
  return row & 1 ? pair >> 16 : pair & 0xFFFFu;
#else
  return __shfl_sync(~0u, plane, group * 16 + upper * 8 + row);
#endif
}
#endif

// Eight codes to eight values u in 0..15, nibble by nibble: on the signed grid u = c - (c >> 3).
DEVICE u32 to_unsigned(u32 codes) {
#if SIGNED
  return codes - ((codes >> 3) & 0x11111111u);
#else
  return codes;
#endif
}

// Byte operands of mma.m16n8k32 from two words: u of rows g, and of rows g + 8 moved right by `shift`. With
// IS_WHOLE 16 times those of rows g + 8, and those of rows g besides.
template <bool IS_WHOLE = false>
DEVICE void bytes_of(u32 (&a)[4], u32 first, u32 second, int shift) {
  const u32 upper = shift ? 0x0F0F0F0Fu : 0xF0F0F0F0u;
  a[0] = first & 0x0F0F0F0Fu;
  a[1] = IS_WHOLE ? first : (first >> shift) & upper;
  a[2] = second & 0x0F0F0F0Fu;
  a[3] = IS_WHOLE ? second : (second >> shift) & upper;
}

// Codes become signed bytes 16 (u - 8), which costs the upper nibbles nothing; a level is a sixteenth
// of what they stand for. The signed grid counts from 7 (or, at 8 bits, 16 * 7 + 8): its codes are
// raised so that the zero is 8, and what remains of other zeros is a multiple of the sum of x.
#if SIGNED
#define LEFT_OF_ZERO (BITS == 8 ? -8 : 0)
#else
#define LEFT_OF_ZERO (OFFSET ? 128 : 0)
#endif

DEVICE u32 raised(u32 codes) {
#if SIGNED
  return codes + ((~codes & 0x88888888u) >> 3);  // c >= 8 stays, c < 8 grows by 1
#else
  return codes;
#endif
}

DEVICE u32 signed_bytes(u32 nibbles) { return mask_xor(nibbles, 0xF0F0F0F0u, 0x80808080u); }

DEVICE void signed_bytes_of(u32 (&a)[4], u32 first, u32 second) {
  a[0] = signed_bytes(first << 4), a[1] = signed_bytes(first);
  a[2] = signed_bytes(second << 4), a[3] = signed_bytes(second);
}

// Two nibbles 16 bits apart as the bf16 pair 128 + nibble.
DEVICE u32 pair_of(u32 nibbles) { return mask_or(nibbles, 0x000F000Fu, 0x43004300u); }

#define PAIR(value) ((value) * 0x00010001u)
#define BF16_128_PLUS(n) PAIR(0x4300u + (n))  // exact for n in 0..127

// The levels of one step as an A fragment: integers up to 255, exact in bf16.
DEVICE void levels_of(u32 (&a)[4], u32 codes, u32 low) {
  const u32 u = to_unsigned(codes);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // registers are (row g, first pair), (g + 8, first), (g, second), (g + 8, second)
    const int shift = 4 * (i & 1) + 8 * (i >> 1);
    a[i] = sub_pair(pair_of(u >> shift), BF16_128_PLUS(ZERO_HIGH));
#if BITS == 8
    const u32 fine = sub_pair(pair_of(low >> shift), BF16_128_PLUS(ZERO_LOW));
    a[i] = fma_pair(a[i], PAIR(0x4180u), fine);  // 16 a + fine
#endif
  }
}

// bits(A) + r - C for a pair, and zero where r = 0. Sums stay within each half: bits(A) + r - C is the
// magnitude of a bf16 value (or was refused when the weight was stored), and layout.py refuses scales
// so small that bits(A) - C would borrow from the other half. The sign of a zero is that of A with
// EVERY_SIGN; a product sum, which starts at +0, does not see it.
DEVICE u32 refine(u32 anchor, u32 r) {
  const u32 value = anchor + r - PAIR(3583u);
#if __CUDA_ARCH__ >= 900 && !defined(EVERY_SIGN)
  // 1 where r > 0, as bf16 patterns are ordered like integers, and else 0: two instructions, of which
  // one is off the integer pipe, the busiest
  return fma_pair(value, is_positive_pair(r), 0x80008000u);
#else
  const u32 is_nonzero = permute((r + 0x0FFF0FFFu) << 3, 0, 0xBB99);  // bit 12 over its half
  return value & (is_nonzero | 0x80008000u) & (is_nonzero | anchor);
#endif
}

// The exact bf16 weights of one step. scale and half hold s and s / 2 twice, of rows g and g + 8;
// fine holds r8 of rows g and g + 8.
DEVICE void exact_of(u32 (&a)[4], u32 codes, u32 r4, const u32 (&fine)[2], const u32 (&scale)[2],
                     const u32 (&half)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int shift = 4 * (i & 1) + 8 * (i >> 1);
    // c - 8 is exact, and one FMA rounds (c - 8) s + s / 2 once
    const u32 level = sub_pair(pair_of(codes >> shift), BF16_128_PLUS(8));
    const u32 anchor = fma_pair(level, scale[i & 1], half[i & 1]);
    const u32 low = permute(fine[i & 1], 0, i < 2 ? 0x4140 : 0x4342);
    const u32 high = shift < 8 ? r4 << (8 - shift) : r4 >> (shift - 8);
    a[i] = refine(anchor, mask_or(high, 0x0F000F00u, low));
  }
}

// s of a row in both halves, and s / 2.
DEVICE void anchor_factors(u32& scale, u32& half, u32 bits) {
  scale = PAIR(bits);
  half = fma_pair(scale, 0x3F003F00u, 0x80008000u);
}
