// Products of one warp: tiles of packed weights times 8 NT tokens, for kernels whose warps own a range of
// the columns each (direct.cu, persistent.cu). A row of x meets the weights of a range tile after tile; then
// the ranges are added in order. So a sum depends on the matrix alone.
//
// Compile-time parameters besides those of tile.cuh:
//   ACT     16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT      tiles of 8 tokens
//   RT      tiles of 16 rows that a warp multiplies at a time
//   ONE_TOKEN       only the first token counts: sums of others are not finished
//   SHARED_SCALES   tiles lie in shared memory, and scales are read where they are
//   SWIZZLED        x lies as the copy engine leaves boxes of 128 bytes a token, else in rows

#pragma once
#include "tile.cuh"

#ifndef ONE_TOKEN
#define ONE_TOKEN 0
#endif
#ifndef SHARED_SCALES
#define SHARED_SCALES 0
#endif

#ifndef SWIZZLED
#define SWIZZLED 0
#endif

#define RANGES 8
#define TOKENS (NT * 8)
#define ROWS (RT * TILE_ROWS)
#define X_TILE (TILE_COLS * ACT / 8)  // bytes of one token's columns of a tile
#define META_TOKENS (ONE_TOKEN ? 1 : TOKENS)
#if ACT == 8
#define ACT_GROUPS (TILE_COLS / ACT_GROUP)
#define META_TILE (ACT_GROUPS * META_TOKENS * 8)
#define SUBGROUP (GROUP < ACT_GROUP ? GROUP : ACT_GROUP)  // columns that share both scales
#define PART_OF_HALF (SUBGROUP < 64 ? SUBGROUP : 64)     // columns of a subgroup in one half of a tile
#else
#define META_TILE 0
#endif
#define NEXT_SUM (1 + ONE_TOKEN)  // of a fragment's four: rows g and g + 8 of tokens 2t and 2t + 1
#define SUM_STRIDE (ONE_TOKEN ? 1 : TOKENS + 1)
#define SUM_BYTES (ROWS * SUM_STRIDE * 4)  // of a range

struct Lane {
  int lane, g, t;
  int scales;  // from this lane's 16 bytes of a tile's first plane to its scale
};

DEVICE Lane my_lane() {
  Lane l;
  l.lane = this_thread() % 32;
  l.g = l.lane / 4, l.t = l.lane % 4;
  const int at = GROUP == 32 ? l.lane * 4 : (GROUP == 64 ? l.lane : l.lane % 16) * 2;
  l.scales = scale_at(0, 0, 0) + at - l.lane * 16;
  return l;
}

// ---- weights, from memory to registers -----------------------------------------------------------

// What a lane holds of a tile. Scales of 16 rows and all groups are spread over the warp's lanes.
struct Weights {
#if BITS == 0
  uint4 dense[2][4];
#else
  uint4 q4[2];
#if BITS != 4
  uint4 r4[2];
#endif
#if BITS == 16
  uint4 r8[2][2];
#endif
  u32 scales;
#if OFFSET
  u32 offsets;
#endif
#endif
};

// Where this lane's 16 bytes of the next tile of a row of tiles lie.
struct Stream {
  const u8* base;
  const u8* rest;
};

// x of one tile of columns in shared memory, as this lane reads it.
struct Activations {
#if SWIZZLED
  // Boxes of TOKENS x 128 bytes from a multiple of 1024 on, in which 16 bytes lie at their place xor token % 8: where
  // this lane's are of the first token and half of a box. Tokens and boxes further on are constants.
  u32 even;

  DEVICE u32 at(int n, int bytes) const {
    return (bytes & 64 ? even ^ 64 : even) + n * 1024 + bytes / 128 * (TOKENS * 128);
  }
#else
  u32 row[NT];

  DEVICE u32 at(int n, int bytes) const { return row[n] + bytes; }
#endif
  u32 meta;  // its scales and sums
};

DEVICE void load_half(Weights& w, const Stream& s, int h) {
#if BITS == 0
#pragma unroll
  for (int i = 0; i < 4; i++) w.dense[h][i] = load_once(s.base + dense_at(h, i));
#else
  w.q4[h] = load_once(s.base + nibbles_at(h));
#if BITS != 4
  w.r4[h] = load_once(s.rest + nibbles_at(h));
#endif
#if BITS == 16
  w.r8[h][0] = load_once(s.rest + bytes_at(h, 0));
  w.r8[h][1] = load_once(s.rest + bytes_at(h, 1));
#endif
#endif
}

DEVICE void load_scales(Weights& w, const Stream& s, const Lane& l) {
#if BITS != 0
  const u8* from = s.base + l.scales;
#if GROUP == 32
  w.scales = load_once_u32(from);
#if OFFSET
  w.offsets = load_once_u32(from + scale_at(0, 0, 1) - scale_at(0, 0, 0));
#endif
#else
  w.scales = load_once_u16(from);
#if OFFSET
  w.offsets = load_once_u16(from + scale_at(0, 0, 1) - scale_at(0, 0, 0));
#endif
#endif
#endif
}

#if BITS != 0
// The scale, or offset, of this lane's row g or g + 8, out of the lane that holds it. With SHARED_SCALES
// `plane` is the address of that of row g in the first group.
DEVICE u32 spread(const Lane& l, u32 plane, int upper, int group) {
#if SHARED_SCALES
  return load_shared_u16(plane + group * 32 + upper * 16);
#else
  return from_lane_of(l.g, upper, group, plane);
#endif
}
#endif

// Sums of integers arrive as floats with MAGIC added, of which nothing but MAGIC is known: their scaling takes it off.
#define SCALES_MAGIC (ACT == 8 && BITS == 4 && NT > 1 && !LEFT_OF_ZERO)

#if LEVELS
// The scales and shifts of one group for rows g and g + 8.
struct GroupScales {
  float scale[2];
#if SCALES_MAGIC
  float magic[2];  // MAGIC as a number, times that
#endif
#if HAS_SHIFT
  float shift[2];  // offset of the weights in units of the weight: b, and the middle of 16 codes
#endif
};

DEVICE GroupScales scales_of(const Lane& l, const Weights& w, int group) {
  GroupScales s;
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    const float scale = scale_to_float(spread(l, w.scales, upper, group));
    s.scale[upper] = BITS == 8 ? scale * (1.f / 16.f) : scale;
#if HAS_SHIFT
    s.shift[upper] = 0.f;
#endif
#if OFFSET
    s.shift[upper] = scale_to_float(spread(l, w.offsets, upper, group));
#endif
#if MIDDLE
    s.shift[upper] += scale * (7.5f / 16.f);
#endif
  }
  return s;
}
#endif

// ---- multiplication ------------------------------------------------------------------------------

typedef float Accumulators[RT][NT][4];

// Loads half h of the next tile over what has been multiplied.
DEVICE void reload(Weights (&w)[RT], const Stream (&next)[RT], const Lane& l, int h,
                   bool has_next) {
  if (!has_next) return;
#pragma unroll
  for (int r = 0; r < RT; r++) {
    load_half(w[r], next[r], h);
    if (h == 1) load_scales(w[r], next[r], l);
  }
}

#if ACT == 8
// Codes of the upper rows lie in the high nibbles and are multiplied where they are, as 16 times
// themselves: a scale of 1/16 makes up for it exactly. For few tokens whole bytes are multiplied, where their
// products fit, since what the lower rows have added is known; it is known by token, and for many tokens it
// is less work to make signed bytes 16 (u - 8) of all rows (tile.cuh).
#define UPPER 16
#define SIGNED_BYTES (BITS == 4 && NT > 1)
#define WHOLE_BYTES (BITS == 4 && !SIGNED_BYTES)
#define TOGETHER (NT > 6 ? 1 : NT > 3 ? 2 : NT)  // tiles of tokens whose x is in registers at a time

// An integer below 2^22 in size that was added to this is the mantissa of a float: 128 products of a byte and
// an int8 are.
#define MAGIC_BITS 0x4B400000

// `value`, to which that was added, less `zero`.
DEVICE float from_magic(int value, int zero) {
  return __int_as_float(value) - __int_as_float(MAGIC_BITS + zero);
}

// Operands of half h of a tile: u, or its high part.
DEVICE void codes_of(u32 (&a)[2][4], const Weights& w, int h) {
  const uint4 q4 = w.q4[h];
#if SIGNED_BYTES
  signed_bytes_of(a[0], raised(q4.x), raised(q4.y));
  signed_bytes_of(a[1], raised(q4.z), raised(q4.w));
#else
  bytes_of<WHOLE_BYTES>(a[0], to_unsigned(q4.x), to_unsigned(q4.y), 0);
  bytes_of<WHOLE_BYTES>(a[1], to_unsigned(q4.z), to_unsigned(q4.w), 0);
#endif
}

// Integer products of a subgroup of columns, then one float accumulation with both scales.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], const Activations& x,
                          const Stream (&next)[RT], bool has_next) {
  GroupScales scales[GROUP < 64 ? 64 / GROUP : 1][RT];  // of half a tile
  int d[RT][NT][4];
#if BITS == 8
  int high[RT][NT][4];
#endif
#if ONE_TOKEN
  uint2 metas[ACT_GROUPS];
#pragma unroll
  for (int i = 0; i + 1 < ACT_GROUPS; i += 2) {
    const uint4 two = load_shared4(x.meta + i * 8);
    metas[i] = make_uint2(two.x, two.y), metas[i + 1] = make_uint2(two.z, two.w);
  }
  if (ACT_GROUPS == 1) metas[0] = load_shared2(x.meta);
#endif
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][2][4];
#if BITS == 8
    u32 fine[RT][2][4];
#endif
#pragma unroll
    for (int r = 0; r < RT; r++) {
      codes_of(a[r], w[r], h);
#if BITS == 8
      const uint4 r4 = w[r].r4[h];
      bytes_of(fine[r][0], r4.x, r4.y, 0);
      bytes_of(fine[r][1], r4.z, r4.w, 0);
#endif
    }
#pragma unroll
    for (int first = 0; first < NT; first += TOGETHER) {
      const int end = first + TOGETHER < NT ? first + TOGETHER : NT;
      u32 b[NT][4];
#pragma unroll
      for (int n = first; n < end; n++) load_matrices(b[n], x.at(n, h * 64));
#pragma unroll
      for (int part = 0; part < 64; part += PART_OF_HALF) {
        const int column = h * 64 + part, of_half = part / GROUP, act_group = column / ACT_GROUP;
        const int first_step = part / 32, end_step = first_step + PART_OF_HALF / 32;
        const bool starts = column % SUBGROUP == 0, ends = (column + PART_OF_HALF) % SUBGROUP == 0;
        if (column % GROUP == 0 && first == 0) {
#pragma unroll
          for (int r = 0; r < RT; r++) {
            scales[of_half][r] = scales_of(l, w[r], column / GROUP);
            scales[of_half][r].scale[1] *= 1.f / UPPER;
            if (SIGNED_BYTES) scales[of_half][r].scale[0] *= 1.f / UPPER;
#if SCALES_MAGIC
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
              scales[of_half][r].magic[upper] = __int_as_float(MAGIC_BITS) * scales[of_half][r].scale[upper];
            }
#endif
          }
        }
        float xs[NT][2];
        int sum[NT][2];
#pragma unroll
        for (int n = first; n < end; n++) {
          if (!ends && !(BITS == 8 && starts)) break;  // 8 bits begin with the sums
#if ONE_TOKEN
          xs[n][0] = __uint_as_float(metas[act_group].x), xs[n][1] = 0.f;
          sum[n][0] = (int)metas[act_group].y, sum[n][1] = 0;
#elif SCALES_MAGIC && !HAS_SHIFT
          // no sums are asked for, and two loads of a word take less of shared memory than one of four
#pragma unroll
          for (int i = 0; i < 2; i++) {
            xs[n][i] = load_shared(x.meta + (act_group * TOKENS + n * 8 + i) * 8), sum[n][i] = 0;
          }
#else
          const uint4 m = load_shared4(x.meta + (act_group * TOKENS + n * 8) * 8);
          xs[n][0] = __uint_as_float(m.x), xs[n][1] = __uint_as_float(m.z);
          sum[n][0] = (int)m.y, sum[n][1] = (int)m.w;
#endif
#if GROUP < ACT_GROUP
          // sums of the columns that share the weight's scale: a row of ones times x
          int ones[4] = {0, 0, 0, 0};
          const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
          for (int step = first_step; step < end_step; step++) {
            mma_u8s8(ones, one, b[n][2 * step], b[n][2 * step + 1]);
          }
          sum[n][0] = ones[0], sum[n][1] = ones[1];
#endif
        }
#pragma unroll
        for (int r = 0; r < RT; r++) {
#pragma unroll
          for (int n = first; n < end; n++) {
            if (starts) {
#pragma unroll
              for (int i = 0; i < 4; i++) {
#if BITS == 8
                high[r][n][i] = 0, d[r][n][i] = -LEVEL_ZERO * (i < 2 ? 1 : UPPER) * sum[n][i & 1];
#else
                d[r][n][i] = MAGIC_BITS;
#endif
              }
            }
#pragma unroll
            for (int step = first_step; step < end_step; step++) {
#if BITS == 8
              mma_u8s8(high[r][n], a[r][step], b[n][2 * step], b[n][2 * step + 1]);
              mma_u8s8(d[r][n], fine[r][step], b[n][2 * step], b[n][2 * step + 1]);
#elif SIGNED_BYTES
              mma_s8(d[r][n], a[r][step], b[n][2 * step], b[n][2 * step + 1]);
#else
              mma_u8s8(d[r][n], a[r][step], b[n][2 * step], b[n][2 * step + 1]);
#endif
            }
            if (!ends) continue;
            const GroupScales& of = scales[of_half][r];
            float product[4];  // of levels, times the weights' scale: rounded once
#if BITS == 8
#pragma unroll
            for (int i = 0; i < 4; i += NEXT_SUM) {
              product[i] = (float)(d[r][n][i] + 16 * high[r][n][i]) * of.scale[i >> 1];
            }
#else
#pragma unroll
            for (int i = 0; i < 2; i += NEXT_SUM) {
              const int upper = d[r][n][i + 2], lower = d[r][n][i];
#if SCALES_MAGIC
              // exact but for its rounding: a scale of 11 bits or fewer times MAGIC, which has 2, has no more than a float
              product[i] = fmaf(__int_as_float(lower), of.scale[0], -of.magic[0]);
              product[i + 2] = fmaf(__int_as_float(upper), of.scale[1], -of.magic[1]);
#elif SIGNED_BYTES
              product[i] = from_magic(lower, -LEFT_OF_ZERO * sum[n][i]) * of.scale[0];
              product[i + 2] = from_magic(upper, -LEFT_OF_ZERO * sum[n][i]) * of.scale[1];
#else
              const float low = from_magic(lower, LEVEL_ZERO * sum[n][i]);
              const float both = from_magic(upper, LEVEL_ZERO * (UPPER + 1) * sum[n][i]);
              product[i] = low * of.scale[0], product[i + 2] = (both - low) * of.scale[1];
#endif
            }
#endif
#pragma unroll
            for (int i = 0; i < 4; i += NEXT_SUM) {
              acc[r][n][i] = fmaf(product[i], xs[n][i & 1], acc[r][n][i]);
#if HAS_SHIFT
              acc[r][n][i] = fmaf((float)sum[n][i & 1] * xs[n][i & 1], of.shift[i >> 1], acc[r][n][i]);
#endif
            }
          }
        }
      }
    }
    reload(w, next, l, h, has_next);
  }
}
#elif LEVELS
// Products of bf16 x with levels, a group of columns at a time, then its scale.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], const Activations& x,
                          const Stream (&next)[RT], bool has_next) {
  float d[RT][NT][4];
#if HAS_SHIFT
  float sums[NT][4];
  const u32 one[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
#endif
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][4][4];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const uint4 q4 = w[r].q4[h];
#if BITS == 8
      const uint4 r4 = w[r].r4[h];
#else
      const uint4 r4 = {0, 0, 0, 0};
#endif
      levels_of(a[r][0], q4.x, r4.x);
      levels_of(a[r][1], q4.y, r4.y);
      levels_of(a[r][2], q4.z, r4.z);
      levels_of(a[r][3], q4.w, r4.w);
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      const int column = h * 64 + step * 16;
      const bool is_first = column % GROUP == 0, is_last = (column + 32) % GROUP == 0;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x.at(n, h * 128 + step * 32));
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!is_first) break;
#pragma unroll
          for (int r = 0; r < RT; r++) d[r][n][i] = 0.f;
#if HAS_SHIFT
          sums[n][i] = 0.f;
#endif
        }
#pragma unroll
        for (int r = 0; r < RT; r++) mma_bf16(d[r][n], a[r][step], b[0], b[1]);
#pragma unroll
        for (int r = 0; r < RT; r++) mma_bf16(d[r][n], a[r][step + 1], b[2], b[3]);
#if HAS_SHIFT
        mma_bf16(sums[n], one, b[0], b[1]);
        mma_bf16(sums[n], one, b[2], b[3]);
#endif
      }
      if (!is_last) continue;
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const GroupScales s = scales_of(l, w[r], column / GROUP);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
          for (int i = 0; i < 4; i += NEXT_SUM) {
            acc[r][n][i] = fmaf(d[r][n][i], s.scale[i >> 1], acc[r][n][i]);
#if HAS_SHIFT
            acc[r][n][i] = fmaf(sums[n][i & 1], s.shift[i >> 1], acc[r][n][i]);
#endif
          }
        }
      }
    }
    reload(w, next, l, h, has_next);
  }
}
#else
// The bf16 weights of half a tile as A fragments: put together from their planes, or dense ones.
DEVICE void weights_of(u32 (&a)[4][4], const Lane& l, const Weights& w, int h) {
#if BITS == 0
#pragma unroll
  for (int step = 0; step < 4; step++) {
    const uint4 v = w.dense[h][step];
    a[step][0] = v.x, a[step][1] = v.y, a[step][2] = v.z, a[step][3] = v.w;
  }
#else
  const uint4 q4 = w.q4[h], low = w.r4[h], f0 = w.r8[h][0], f1 = w.r8[h][1];
  const u32 codes[4] = {q4.x, q4.y, q4.z, q4.w}, r4[4] = {low.x, low.y, low.z, low.w};
  const u32 r8[4][2] = {{f0.x, f0.y}, {f0.z, f0.w}, {f1.x, f1.y}, {f1.z, f1.w}};
  u32 scale[2], half[2];
#pragma unroll
  for (int step = 0; step < 4; step++) {
    if (step % (GROUP / 16) == 0) {
      const int group = (h * 64 + step * 16) / GROUP;
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        anchor_factors(scale[upper], half[upper], spread(l, w.scales, upper, group));
      }
    }
    exact_of(a[step], codes[step], r4[step], r8[step], scale, half);
  }
#endif
}

DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], const Activations& x,
                          const Stream (&next)[RT], bool has_next) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][4][4];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      weights_of(a[r], l, w[r], h);
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x.at(n, h * 128 + step * 32));
#pragma unroll
        for (int r = 0; r < RT; r++) mma_bf16(acc[r][n], a[r][step], b[0], b[1]);
#pragma unroll
        for (int r = 0; r < RT; r++) mma_bf16(acc[r][n], a[r][step + 1], b[2], b[3]);
      }
    }
    reload(w, next, l, h, has_next);
  }
}
#endif

// ---- sums ----------------------------------------------------------------------------------------

// The sums of this warp's range, in its own shared memory: [row][SUM_STRIDE] float32.
DEVICE void leave_sums(u32 to, const Accumulators& acc, const Lane& l) {
  if (ONE_TOKEN && l.t) return;
#pragma unroll
  for (int r = 0; r < RT; r++) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i += NEXT_SUM) {
        const int row = r * TILE_ROWS + l.g + 8 * (i >> 1), token = n * 8 + 2 * l.t + (i & 1);
        store_shared(to + (row * SUM_STRIDE + token) * 4, acc[r][n][i]);
      }
    }
  }
}
