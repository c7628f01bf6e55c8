// A tile of weights times a tile of x, by warpgroup products: `multiply_tile` of each form of weights and of x.
//
// It loads the next tile of weights into the registers of this one as soon as these are decoded. When it returns
// its products are done, but where they stay in flight (ROLLS): there it has released the tile of x before.

#pragma once
#include "wgmma.cuh"
#include "wide_weights.cuh"

// Operand A of two pairs of steps: products read one pair while the next is decoded.
typedef u32 Operands[2][2][4];

// One tile of columns of x: its descriptor, and the shared address of its scales and sums.
struct TileOfX {
  u32 x, meta;
};

#if BITS
#if ACT == 8
#define NEEDS_ONES ((LEFT_OF_ZERO || HAS_SHIFT) && GROUP < ACT_GROUP)
#else
#define NEEDS_ONES HAS_SHIFT
#endif

#if NEEDS_ONES
// An operand A of nothing but ones: its products are sums of x. It comes from memory, once a tile. Of a
// constant ptxas knows that the four registers are the same, and forgot to set three of them (13.5).
__shared__ uint4 ones_of_a;

DEVICE void write_ones() {
  const u32 one = ACT == 8 ? 0x01010101u : 0x3F803F80u;
  store_shared4(smem_address(&ones_of_a), make_uint4(one, one, one, one));
}

DEVICE void load_ones(u32 (&one)[4]) {
  const uint4 v = load_shared4(smem_address(&ones_of_a));
  one[0] = v.x, one[1] = v.y, one[2] = v.z, one[3] = v.w;
}
#endif

// A row's scale, and its weights' offset in units of the weight: b, and the middle of 16 codes.
DEVICE float row_scale(const Lane& l, const Raw& raw, int group, int upper) {
  return scale_to_float(spread(l, raw.scales, group, upper));
}

DEVICE float row_shift(const Lane& l, const Raw& raw, int group, int upper) {
  float shift = 0.f;
#if OFFSET
  shift = scale_to_float(spread(l, raw.offsets, group, upper));
#endif
#if MIDDLE
  shift += row_scale(l, raw, group, upper) * (7.5f / 16.f);
#endif
  return shift;
}
#endif

#if ACT == 8
#define SUB_NT (NT == 6 ? 6 : 4)                  // tiles of 8 tokens in a product
#define SUBTILES (NT / SUB_NT)
#define PRODUCTS (TILE_COLS / SUBGROUP * SUBTILES)  // of a tile

// Integer products of a subgroup of columns and 32 or 48 tokens.
struct IntegerProduct {
  int d[SUB_NT][4];
#if NEEDS_ONES
  int ones[SUB_NT][4];
#endif
};

DEVICE void add_product(Accumulators& acc, IntegerProduct& of, const Lane& l, u32 meta, int subtile,
                        const float (&scale)[2], const float (&shift)[2]) {
  hold(of.d);
#if NEEDS_ONES
  hold(of.ones);
#endif
#pragma unroll
  for (int n = 0; n < SUB_NT; n++) {
    const uint4 m = load_shared4(meta + ((subtile * SUB_NT + n) * 8 + 2 * l.t) * 8);
    const float xs[2] = {__uint_as_float(m.x), __uint_as_float(m.z)};
#if NEEDS_ONES
    const int sum[2] = {of.ones[n][0], of.ones[n][1]};
#else
    const int sum[2] = {(int)m.y, (int)m.w};
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float& to = acc[subtile * SUB_NT + n][i];
      const int level = of.d[n][i] + LEFT_OF_ZERO * sum[i & 1];
      to = fmaf((float)level * scale[i >> 1], xs[i & 1], to);
#if HAS_SHIFT
      to = fmaf((float)sum[i & 1] * xs[i & 1], shift[i >> 1], to);
#endif
    }
  }
}

// Each product is under way while the one before it is scaled and added.
DEVICE void multiply_tile(Accumulators& acc, Raw& raw, const Lane& l, const TileOfX& tile,
                          const Stream& next, bool is_there) {
  float scale[GROUPS_PER_TILE][2], shift[GROUPS_PER_TILE][2];
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      scale[group][upper] = row_scale(l, raw, group, upper) * (1.f / 16.f);
      shift[group][upper] = HAS_SHIFT ? row_shift(l, raw, group, upper) : 0.f;
    }
  }
  next.load_scales(raw, is_there);
  u32 a[2][2][4];
#if BITS == 8
  u32 fine[2][2][4];
#endif
  IntegerProduct product[2];
#if NEEDS_ONES
  u32 one[4];
  load_ones(one);
#endif
#pragma unroll
  for (int j = 0; j < PRODUCTS + 2; j++) {
    const int column = j / SUBTILES * SUBGROUP, subtile = j % SUBTILES;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      // a half is decoded where its columns begin
      if (j >= PRODUCTS || subtile || h * 64 < column || h * 64 >= column + SUBGROUP) continue;
      const uint4 w = raw.pieces[h][0];
      signed_bytes_of(a[h][0], raised(w.x), raised(w.y));
      signed_bytes_of(a[h][1], raised(w.z), raised(w.w));
#if BITS == 8
      const uint4 e = raw.pieces[h][1];
      bytes_of(fine[h][0], e.x, e.y, 4);
      bytes_of(fine[h][1], e.z, e.w, 4);
#endif
      next.load_half(raw, is_there, h);
    }
    if (j >= 2) {
      const int k = j - 2, before = k / SUBTILES * SUBGROUP;
      if (j <= PRODUCTS) wgmma_wait<1>();
      else wgmma_wait<0>();
      add_product(acc, product[k & 1], l, tile.meta + before / ACT_GROUP * (TOKENS * 8),
                  k % SUBTILES, scale[before / GROUP], shift[before / GROUP]);
    }
    if (j < PRODUCTS) {
#pragma unroll
      for (int at = column; at < column + SUBGROUP; at += 32) {
        settle(a[at / 64][at / 32 % 2]);
#if BITS == 8
        settle(fine[at / 64][at / 32 % 2]);
#endif
      }
      wgmma_begin();
#pragma unroll
      for (int at = column; at < column + SUBGROUP; at += 32) {
        const int h = at / 64, step = at / 32 % 2;
        const u32 b = tile.x + (subtile * SUB_NT * 1024 + at) / 16;
        if (at == column) wgmma_s8<false>(product[j & 1].d, a[h][step], b);
        else wgmma_s8<true>(product[j & 1].d, a[h][step], b);
#if BITS == 8
        wgmma_u8s8<true>(product[j & 1].d, fine[h][step], b);
#endif
#if NEEDS_ONES
        if (at == column) wgmma_s8<false>(product[j & 1].ones, one, b);
        else wgmma_s8<true>(product[j & 1].ones, one, b);
#endif
      }
      wgmma_commit();
    }
  }
}
#elif BITS == 4 || BITS == 8
// Products of bf16 x with levels, a group of columns at a time, then its scale.
DEVICE void multiply_tile(Accumulators& acc, Raw& raw, const Lane& l, const TileOfX& tile,
                          const Stream& next, bool is_there) {
  const float unit = BITS == 8 ? 1.f / 16.f : 1.f;
  float scale[GROUPS_PER_TILE][2];
#if HAS_SHIFT
  float shift[GROUPS_PER_TILE][2];
#endif
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      scale[group][upper] = row_scale(l, raw, group, upper) * unit;
#if HAS_SHIFT
      shift[group][upper] = row_shift(l, raw, group, upper);
#endif
    }
  }
  next.load_scales(raw, is_there);
  Operands a;
  float d[NT][4];
#if HAS_SHIFT
  float ones[NT][4];
  u32 one[4];
  load_ones(one);
#endif
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    const int h = pair / 2, group = pair * 32 / GROUP;
    const bool starts = pair * 32 % GROUP == 0, ends = (pair + 1) * 32 % GROUP == 0;
    if (pair >= 2) wgmma_wait<1>();  // the registers of the pair before the last are free
    const uint4 w = raw.pieces[h][0];
    const u32 codes[4] = {w.x, w.y, w.z, w.w};
#if BITS == 8
    const uint4 e = raw.pieces[h][1];
    const u32 low[4] = {e.x, e.y, e.z, e.w};
#else
    const u32 low[4] = {0, 0, 0, 0};
#endif
#pragma unroll
    for (int i = 0; i < 2; i++) {
      levels_of(a[pair % 2][i], codes[pair % 2 * 2 + i], low[pair % 2 * 2 + i]);
      settle(a[pair % 2][i]);
    }
    if (pair % 2) next.load_half(raw, is_there, h);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 b = tile.x + (h * (X_BYTES / 2) + (pair % 2 * 2 + i) * 32) / 16;
      if (starts && i == 0) wgmma_bf16<false>(d, a[pair % 2][i], b);
      else wgmma_bf16<true>(d, a[pair % 2][i], b);
#if HAS_SHIFT
      if (starts && i == 0) wgmma_bf16<false>(ones, one, b);
      else wgmma_bf16<true>(ones, one, b);
#endif
    }
    wgmma_commit();
    if (!ends) continue;
    wgmma_wait<0>();
    hold(d);
#if HAS_SHIFT
    hold(ones);
#endif
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        acc[n][i] = fmaf(d[n][i], scale[group][i >> 1], acc[n][i]);
#if HAS_SHIFT
        acc[n][i] = fmaf(ones[n][i & 1], shift[group][i >> 1], acc[n][i]);
#endif
      }
    }
  }
}
#else
// The bf16 weights themselves, put together from their planes or dense ones, 32 columns at a time.
DEVICE void multiply_tile(Accumulators& acc, Raw& raw, const Lane& l, const TileOfX& tile,
                          const Stream& next, bool is_there
#if ROLLS
                          ,
                          u32 release, Operands& a
#endif
) {
#if !ROLLS
  Operands a;
#endif
#if BITS == 16
  u32 scale[GROUPS_PER_TILE][2], half[GROUPS_PER_TILE][2];
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      anchor_factors(scale[group][upper], half[group][upper], spread(l, raw.scales, group, upper));
    }
  }
  next.load_scales(raw, is_there);
#endif
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    const int h = pair / 2;
    if (ROLLS || pair >= 2) wgmma_wait<1>();  // the registers of the pair before the last are free
#if ROLLS
    if (pair == 1 && l.lane == 0 && release) barrier_arrive(release);  // so is the tile before
#endif
    u32(&now)[2][4] = a[pair % 2];
#if BITS == 0
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 w = raw.pieces[h][pair % 2 * 2 + i];
      now[i][0] = w.x, now[i][1] = w.y, now[i][2] = w.z, now[i][3] = w.w;
    }
#else
    const uint4 w = raw.pieces[h][0], e = raw.pieces[h][1], f = raw.pieces[h][2 + pair % 2];
    const u32 codes[2] = {pair % 2 ? w.z : w.x, pair % 2 ? w.w : w.y};
    const u32 r4[2] = {pair % 2 ? e.z : e.x, pair % 2 ? e.w : e.y};
    const u32 r8[2][2] = {{f.x, f.y}, {f.z, f.w}};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      exact_of(now[i], codes[i], r4[i], r8[i], scale[pair * 32 / GROUP], half[pair * 32 / GROUP]);
    }
#endif
    settle(now[0]), settle(now[1]);
#if BITS
    if (pair % 2) next.load_half(raw, is_there, h);
#endif
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      wgmma_bf16<true>(acc, now[i], tile.x + (h * (X_BYTES / 2) + (pair % 2 * 2 + i) * 32) / 16);
    }
    wgmma_commit();
#if !BITS
    if (pair % 2) {
      wgmma_wait<0>();  // these products read the very registers that the load writes
      next.load_half(raw, is_there, h);
    }
#endif
  }
#if !ROLLS
  wgmma_wait<0>();
  hold(acc);
#endif
}
#endif
