// out [tokens, rows] = x [tokens, columns] times packed weights, transposed, for 17 tokens and more.
//
// A block of rows is WGS * 64 of them; all tokens of a block (up to NT * 8) meet a weight as soon as it
// is decoded. Each warp streams the weights of its 16 rows straight into registers, a tile ahead, and
// hands them to warpgroup products as operand A. The warps take turns in keeping a ring of tiles of x in
// shared memory. Weights do not depend on earlier kernels, so the first are under way before those end.
//
// The order of a sum depends on the matrix alone, and direct.cu has the same: the columns are cut into
// RANGES, range r from tile num_col_tiles * r / RANGES on; a range is summed from 0, group by group, and
// the ranges' sums are added in order. Work is dealt out in units of one range of one block of rows: a
// thread block takes so many in a row. What it has of one block of rows is a share, and it computes its
// last share first. The total of a share so far lies in shared memory. Rows that are shared:
//   where thread blocks have few units, a total that lacks later ranges and the sums of ranges behind
//   others' go to a workspace; all who share rows wait for each other at their end and fold a slice
//   each. Where they have at least RANGES - 1 (`passes`), nobody is between two others: the first
//   passes its total on, early, since its last share is computed first, and the next goes on from it.
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT   16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT    tiles of 8 tokens: 4, 5, 6, 8, 10, 12, 16 or 20; of int8 x 4, 6, 8, 12 or 16
//   WGS   warpgroups         RANGES ranges of columns

#include "tile.cuh"
#include "wgmma.cuh"

#define TOKENS (NT * 8)
#if ACT == 8
#define X_BYTES (TOKENS * 128)  // of a tile of columns
#define ACT_GROUPS (TILE_COLS / ACT_GROUP)
#define META_BYTES (ACT_GROUPS * TOKENS * 8)
#define SUBGROUP (GROUP < ACT_GROUP ? GROUP : ACT_GROUP)
#else
#define X_BYTES (TOKENS * 256)
#define META_BYTES 0
#endif
#define WARPS (WGS * 4)
#define THREADS (WARPS * 32)
#define MAX_STAGES 32
#define ITEMS (THREADS * NT)  // groups of four sums in a block's range
#define ROLLS (BITS == 16 && NT > 8)  // products stay in flight from tile to tile

struct Problem {
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  float4* parts;  // [token block, row block][RANGES][ITEMS]
  u32* arrivals;  // [token block, row block]: ranges whose sums are there, RANGES more every time
  u32* flags;     // [token block, row block][WARPS]: a total waits for the next thread block
  int num_tokens, num_rows, num_row_tiles, num_col_tiles, num_row_blocks;
  int pitch, num_stages;
  int units, num_longer;  // of thread blocks
  int passes;     // shared rows: totals pass from thread block to thread block
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

DEVICE int range_start(const Problem& p, int range) {
  return (u32)p.num_col_tiles * (u32)range / RANGES;
}

// The first unit of thread block i, and the thread block of a unit: the first `num_longer` have one
// unit more than the others.
DEVICE int first_unit(const Problem& p, int i) { return p.units * i + min(i, p.num_longer); }

DEVICE int owner_of(const Problem& p, int unit) {
  const int behind = unit - (p.units + 1) * p.num_longer;
  return behind < 0 ? unit / (p.units + 1) : p.num_longer + behind / p.units;
}

// Where the sums of a block of rows lie in the workspace, counted in blocks of rows.
DEVICE int place_of(const Problem& p, int block) {
  return blockIdx.y * p.num_row_blocks + block;
}

struct Lane {
  int lane, g, t, warp;
};

// ---- weights: global memory to registers ---------------------------------------------------------

#if BITS == 0 || BITS == 16
#define PIECES 4  // of 16 bytes, a lane and half tile
#else
#define PIECES (BITS / 4)
#endif

// A tile as it lies in memory: a lane's pieces of both halves, its rows' scales and offsets.
struct Raw {
  uint4 pieces[2][PIECES];
#if BITS
#if GROUP == 128
  u32 scales[2];  // of rows g and g + 8
#if OFFSET
  u32 offsets[2];
#endif
#else
  u32 scales;  // of 16 rows and all groups, spread over the warp's lanes
#if OFFSET
  u32 offsets;
#endif
#endif
#endif
};

#if BITS
// The scale, or offset, of this lane's row g or g + 8.
#if GROUP == 128
DEVICE u32 spread(const Lane& l, const u32 (&plane)[2], int group, int upper) { return plane[upper]; }
#else
DEVICE u32 spread(const Lane& l, u32 plane, int group, int upper) {
  return from_lane_of(l.g, upper, group, plane);
}
#endif
#endif

// A warp's tiles in order, from block of rows to block of rows: where this lane reads the next one.
struct Stream {
  const u8* base;
  const u8* rest;
  int to_scales;  // from base; a third pointer is more than the registers hold

  DEVICE Stream(const Problem& p, const Lane& l, int row_tile, int column) {
    const size_t tile = (size_t)row_tile * p.num_col_tiles + column;
    base = p.base + tile * BASE_BYTES + l.lane * 16;
    rest = p.rest + tile * REST_BYTES + l.lane * 16;
#if BITS
    const int at = GROUP == 32 ? l.lane * 4 : (GROUP == 64 ? l.lane : l.g) * 2;
    to_scales = scale_at(0, 0, 0) + at - l.lane * 16;
#endif
  }

  DEVICE void load_half(Raw& raw, bool is_there, int h) const {
    if (!is_there) return;
#if BITS == 0
#pragma unroll
    for (int i = 0; i < 4; i++) raw.pieces[h][i] = load_once(base + dense_at(h, i));
#else
    raw.pieces[h][0] = load_once(base + nibbles_at(h));
#if BITS >= 8
    raw.pieces[h][1] = load_once(rest + nibbles_at(h));
#endif
#if BITS == 16
    raw.pieces[h][2] = load_once(rest + bytes_at(h, 0));
    raw.pieces[h][3] = load_once(rest + bytes_at(h, 1));
#endif
#endif
  }

  DEVICE void load_scales(Raw& raw, bool is_there) const {
#if BITS
    if (!is_there) return;
    const u8* scales = base + to_scales;
#if GROUP == 128
    raw.scales[0] = load_once_u16(scales), raw.scales[1] = load_once_u16(scales + 16);
#elif GROUP == 64
    raw.scales = load_once_u16(scales);
#else
    raw.scales = load_once_u32(scales);
#endif
#if OFFSET
    const u8* offsets = scales + GROUPS_PER_TILE * 32;
#if GROUP == 128
    raw.offsets[0] = load_once_u16(offsets), raw.offsets[1] = load_once_u16(offsets + 16);
#elif GROUP == 64
    raw.offsets = load_once_u16(offsets);
#else
    raw.offsets = load_once_u32(offsets);
#endif
#endif
#endif
  }

  DEVICE void skip() { base += BASE_BYTES, rest += REST_BYTES; }
};

// ---- multiplication ------------------------------------------------------------------------------

typedef float Accumulators[NT][4];

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
#define SUBGROUPS (64 / SUBGROUP)                 // of half a tile
#define PRODUCTS (2 * SUBGROUPS * SUBTILES)       // of a tile

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
      to = fmaf((float)level, xs[i & 1] * scale[i >> 1], to);
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
    const int h = j / (PRODUCTS / 2), sub = j / SUBTILES % SUBGROUPS, subtile = j % SUBTILES;
    if (j < PRODUCTS && j % (PRODUCTS / 2) == 0) {
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
      const int k = j - 2, column = k / (PRODUCTS / 2) * 64 + k / SUBTILES % SUBGROUPS * SUBGROUP;
      if (j <= PRODUCTS) wgmma_wait<1>();
      else wgmma_wait<0>();
      add_product(acc, product[k & 1], l, tile.meta + column / ACT_GROUP * (TOKENS * 8),
                  k % SUBTILES, scale[column / GROUP], shift[column / GROUP]);
    }
    if (j < PRODUCTS) {
#pragma unroll
      for (int step = 0; step < SUBGROUP / 32; step++) {
        settle(a[h][sub * (SUBGROUP / 32) + step]);
#if BITS == 8
        settle(fine[h][sub * (SUBGROUP / 32) + step]);
#endif
      }
      wgmma_begin();
#pragma unroll
      for (int step = 0; step < SUBGROUP / 32; step++) {
        const int at_step = sub * (SUBGROUP / 32) + step;
        const u32 b = tile.x + (subtile * SUB_NT * 1024 + h * 64 + at_step * 32) / 16;
        if (step == 0) wgmma_s8<false>(product[j & 1].d, a[h][at_step], b);
        else wgmma_s8<true>(product[j & 1].d, a[h][at_step], b);
#if BITS == 8
        wgmma_u8s8<true>(product[j & 1].d, fine[h][at_step], b);
#endif
#if NEEDS_ONES
        wgmma_s8<false>(product[j & 1].ones, one, b);  // a subgroup is one step
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
    u32 a[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      levels_of(a[i], codes[pair % 2 * 2 + i], low[pair % 2 * 2 + i]);
      settle(a[i]);
    }
    if (pair % 2) next.load_half(raw, is_there, h);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 b = tile.x + (h * (X_BYTES / 2) + (pair % 2 * 2 + i) * 32) / 16;
      if (starts && i == 0) wgmma_bf16<false>(d, a[i], b);
      else wgmma_bf16<true>(d, a[i], b);
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
                          u32 release
#endif
) {
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
    u32 a[2][4];
#if BITS == 0
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 w = raw.pieces[h][pair % 2 * 2 + i];
      a[i][0] = w.x, a[i][1] = w.y, a[i][2] = w.z, a[i][3] = w.w;
    }
#else
    const uint4 w = raw.pieces[h][0], e = raw.pieces[h][1], f = raw.pieces[h][2 + pair % 2];
    const u32 codes[2] = {pair % 2 ? w.z : w.x, pair % 2 ? w.w : w.y};
    const u32 r4[2] = {pair % 2 ? e.z : e.x, pair % 2 ? e.w : e.y};
    const u32 r8[2][2] = {{f.x, f.y}, {f.z, f.w}};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      exact_of(a[i], codes[i], r4[i], r8[i], scale[pair * 32 / GROUP], half[pair * 32 / GROUP]);
    }
#endif
    settle(a[0]), settle(a[1]);
#if BITS
    if (pair % 2) next.load_half(raw, is_there, h);
#endif
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      wgmma_bf16<true>(acc, a[i], tile.x + (h * (X_BYTES / 2) + (pair % 2 * 2 + i) * 32) / 16);
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

// ---- results -------------------------------------------------------------------------------------

DEVICE float bias_of(const Problem& p, int row) {
  if (p.bias_kind == 0 || row >= p.num_rows) return 0.f;
  if (p.bias_kind == 1) return bf16_to_float(((const u16*)p.bias)[row]);
  return ((const float*)p.bias)[row];
}

// Four sums of a lane: rows g and g + 8 of its warp's 16, two tokens.
DEVICE void store_sums(const Problem& p, int block, const Lane& l, int n, const float (&sum)[4],
                       const float (&bias)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = (block * WARPS + l.warp) * TILE_ROWS + l.g + 8 * (i >> 1);
    const int token = blockIdx.y * TOKENS + n * 8 + 2 * l.t + (i & 1);
    if (token >= p.num_tokens || row >= p.num_rows) continue;
    const float value = sum[i] + bias[i >> 1];
    const size_t at = (size_t)token * p.num_rows + row;
    if (p.out_is_float) ((float*)p.out)[at] = value;
    else ((u16*)p.out)[at] = float_to_bf16(value);
  }
}

DEVICE void bias_of_rows(float (&bias)[2], const Problem& p, int block, const Lane& l) {
  const int row = (block * WARPS + l.warp) * TILE_ROWS + l.g;
  bias[0] = bias_of(p, row), bias[1] = bias_of(p, row + 8);
}

DEVICE void clear(Accumulators& acc) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
}

DEVICE Lane lane_of(int thread) {
  Lane l;
  l.lane = thread % 32, l.g = l.lane / 4, l.t = l.lane % 4, l.warp = thread / 32;
  return l;
}

// Ranges [first, last) of a block of rows.
struct Share {
  int block, first, last;
};

DEVICE Share share_of(int begin, int end, int block) {
  return {block, max(begin - block * RANGES, 0), min(end - block * RANGES, RANGES)};
}

// This lane's sums in the workspace, [n][thread].
DEVICE void write_sums(float4* to, const Accumulators& acc) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    __stcg(to + n * THREADS, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
  }
}

// A total for the same warp of the next thread block, which goes on from there.
DEVICE void pass_on(const Problem& p, const Lane& l, const Accumulators& total, int block) {
  write_sums(p.parts + (size_t)place_of(p, block) * ITEMS + threadIdx.x, total);
  __syncwarp();
  if (l.lane == 0) store_release(p.flags + place_of(p, block) * WARPS + l.warp, 1);
}

// What the thread block before this one passed on; acc is added to it.
DEVICE void go_on(const Problem& p, const Lane& l, Accumulators& acc, int block) {
  u32* flag = p.flags + place_of(p, block) * WARPS + l.warp;
  if (l.lane == 0) {
    while (!load_acquire(flag)) {
    }
    *flag = 0;
  }
  __syncwarp();
  const float4* from = p.parts + (size_t)place_of(p, block) * ITEMS + threadIdx.x;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float4 before = __ldcg(from + n * THREADS);
    acc[n][0] = before.x + acc[n][0], acc[n][1] = before.y + acc[n][1];
    acc[n][2] = before.z + acc[n][2], acc[n][3] = before.w + acc[n][3];
  }
}

// The total of a share so far lies in shared memory, [n][thread]: `totals` is this thread's place.
DEVICE void add_total(Accumulators& acc, u32 totals) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint4 before = load_shared4(totals + n * (THREADS * 16));
    acc[n][0] = __uint_as_float(before.x) + acc[n][0];
    acc[n][1] = __uint_as_float(before.y) + acc[n][1];
    acc[n][2] = __uint_as_float(before.z) + acc[n][2];
    acc[n][3] = __uint_as_float(before.w) + acc[n][3];
  }
}

DEVICE void keep_total(u32 totals, const Accumulators& acc) {
#pragma unroll
  for (int n = 0; n < NT; n++) store_shared4(totals + n * (THREADS * 16), acc[n]);
}

// A range of a share is summed.
DEVICE void end_range(const Problem& p, const Lane& l, Accumulators& acc, u32 totals,
                      const Share& share, int range) {
  if (range > share.first) {
    if (share.first == 0 || p.passes) add_total(acc, totals);
  } else if (share.first > 0 && p.passes) {
    go_on(p, l, acc, share.block);
  }
  if (share.first > 0 && !p.passes) {
    const size_t at = (size_t)place_of(p, share.block) * RANGES + range;
    write_sums(p.parts + at * ITEMS + threadIdx.x, acc);
  } else if (range + 1 < share.last) {
    keep_total(totals, acc);
  } else if (share.last == RANGES) {
    float bias[2];
    bias_of_rows(bias, p, share.block, l);
#pragma unroll
    for (int n = 0; n < NT; n++) store_sums(p, share.block, l, n, acc[n], bias);
  } else if (p.passes) {
    pass_on(p, l, acc, share.block);
  } else {  // the total takes the place of range 0
    write_sums(p.parts + (size_t)place_of(p, share.block) * RANGES * ITEMS + threadIdx.x, acc);
  }
  clear(acc);
}

// This block's sums of `count` ranges of some rows are in the workspace. Thread 0 gets the largest count
// that says that not all are: never 0, although counts begin again after the largest number.
DEVICE u32 arrive(const Problem& p, int block, u32 count) {
  __syncthreads();
  u32 seen = 0;
  if (threadIdx.x == 0) seen = add_and_order(p.arrivals + place_of(p, block), count);
  return (seen / RANGES + 1) * RANGES - 1;
}

// Wait for all ranges of a block of rows, then add them up and store this thread block's slice.
DEVICE void fold(const Problem& p, int block, u32 too_few) {
  if (threadIdx.x == 0) {
    while ((int)(load_acquire(p.arrivals + place_of(p, block)) - too_few) <= 0) {
    }
  }
  __syncthreads();
  const int head = owner_of(p, block * RANGES), tail = owner_of(p, block * RANGES + RANGES - 1);
  const int next_range = first_unit(p, head + 1) - block * RANGES;  // behind the head's total
  const int sharers = tail - head + 1, rank = blockIdx.x - head;
  const float4* from = p.parts + (size_t)place_of(p, block) * RANGES * ITEMS;
  const int stop = ITEMS * (rank + 1) / sharers;
  for (int item = ITEMS * rank / sharers + threadIdx.x; item < stop; item += THREADS) {
    float4 part[RANGES];
#pragma unroll
    for (int r = 0; r < RANGES; r++) {
      if (r == 0 || r >= next_range) part[r] = __ldcg(from + (size_t)r * ITEMS + item);
    }
    float sum[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
    for (int r = 1; r < RANGES; r++) {
      if (r < next_range) continue;
      sum[0] += part[r].x, sum[1] += part[r].y, sum[2] += part[r].z, sum[3] += part[r].w;
    }
    const Lane l = lane_of(item % THREADS);
    float bias[2];
    bias_of_rows(bias, p, block, l);
    store_sums(p, block, l, item / THREADS, sum, bias);
  }
}

// ---- x -------------------------------------------------------------------------------------------

struct Ring {
  u32 x, meta, full, empty;
};

DEVICE void fetch_x(const Problem& p, const Ring& ring, const TensorMap* map, int slot, int column,
                    int lane) {
  const u32 bar = ring.full + slot * 8, to = ring.x + slot * X_BYTES;
  const int first_token = blockIdx.y * TOKENS;
  if (lane == 0) barrier_expect(bar, X_BYTES + META_BYTES);
  __syncwarp();
#if ACT == 8
  if (lane == 0) tensor_load(to, map, column * TILE_COLS, first_token, bar);
  if (lane >= 1 && lane <= ACT_GROUPS) {
    const size_t group = (size_t)column * ACT_GROUPS + lane - 1;
    bulk_load(ring.meta + slot * META_BYTES + (lane - 1) * (TOKENS * 8),
              p.meta + (group * p.pitch + first_token) * 8, TOKENS * 8, bar);
  }
#else
  if (lane < 2) {
    tensor_load(to + lane * (X_BYTES / 2), map, column * TILE_COLS + lane * 64, first_token, bar);
  }
#endif
  __syncwarp();
}

// What a thread block seldom looks at lies in shared memory; registers are short.
struct Seldom {
  int begin, end;                // units
  int num_tiles;                 // of all shares: the last block of rows first, the first one last
  int head_column, head_tiles;   // of the first share
  int whole_tiles, tail_column;  // of those in the middle, and of the last
  u32 too_few_of_first, too_few_of_last;  // arrivals, of rows that others share; else 0

  DEVICE void plan(const Problem& p, int i) {
    begin = first_unit(p, i), end = first_unit(p, i + 1);
    const int first_block = begin / RANGES, last_block = (end - 1) / RANGES;
    const int first_column = range_start(p, begin % RANGES);
    head_column = first_block == last_block ? first_column : 0;
    head_tiles = range_start(p, end - last_block * RANGES) - head_column;
    whole_tiles = max(last_block - first_block - 1, 0) * p.num_col_tiles;
    tail_column = first_column;
    num_tiles = head_tiles + whole_tiles;
    if (first_block < last_block) num_tiles += p.num_col_tiles - tail_column;
    too_few_of_first = too_few_of_last = 0;
  }

  DEVICE int column_of(const Problem& p, int tile) const {
    if (tile < head_tiles) return head_column + tile;
    const int behind = tile - head_tiles;
    return behind < whole_tiles ? behind % p.num_col_tiles : behind - whole_tiles + tail_column;
  }
};

// The tiles of x of a thread block are fetched by its warps in turn. A warp's next turn: when all have
// read the tile LAG before tile `due`, tile number `index` of all takes its place.
#define LAG 2

struct Turn {
  int index, slot, parity;

  // At which tile; never if there are no more tiles.
  DEVICE int due(const Problem& p, int num_tiles) const {
    return index < num_tiles ? index - p.num_stages + LAG : -1;
  }

  DEVICE void take(const Problem& p, const Ring& ring, const TensorMap* map, const Seldom& seldom,
                   int lane) {
    if (index >= p.num_stages) barrier_wait(ring.empty + slot * 8, parity ^ 1);
    fetch_x(p, ring, map, slot, seldom.column_of(p, index), lane);
    index += WARPS, slot += WARPS;
    while (slot >= p.num_stages) slot -= p.num_stages, parity ^= 1;
  }
};

// Where a warp is, of which its loop over tiles knows only the next tile at which it must look here.
// In shared memory, since registers are short.
struct Progress {
  int due;        // the tile at which it is its turn to fetch x
  int wrap;       // at which the ring of x starts again
  int switch_at;  // whose next weights are those of another share
  int range_end;  // with which another range begins
  int range;
  Share share;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wide(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw_bytes[];
  __shared__ u64 barriers[2 * MAX_STAGES];
  __shared__ Seldom seldom;
  __shared__ Turn turns[WARPS];
  __shared__ Progress progress[WARPS];
  launch_dependents();
  const Lane l = lane_of(threadIdx.x);
  Ring ring;
  ring.x = (smem_address(raw_bytes) + 1023) / 1024 * 1024;
  ring.meta = ring.x + p.num_stages * X_BYTES;
  ring.full = computed_once(smem_address(barriers));
  ring.empty = ring.full + MAX_STAGES * 8;
  const u32 totals = ring.meta + p.num_stages * META_BYTES + threadIdx.x * 16;

  Raw raw = {};
  Share share;
  {
    const int begin = first_unit(p, blockIdx.x), end = first_unit(p, blockIdx.x + 1);
    share = share_of(begin, end, (end - 1) / RANGES);
  }
  const int row_tile = share.block * WARPS + l.warp;
  Stream next(p, l, row_tile, range_start(p, share.first));
  // Rows beyond the matrix have no weights; what is multiplied for them is not stored.
  bool is_there = row_tile < p.num_row_tiles;
  // the first weights are on their way before anything else happens
  next.load_scales(raw, is_there);
  next.load_half(raw, is_there, 0);
  next.load_half(raw, is_there, 1);
  if (l.warp == 0) {
    for (int i = l.lane; i < p.num_stages; i += 32) {
      barrier_init(ring.full + i * 8, 1);
      barrier_init(ring.empty + i * 8, WARPS);
    }
    publish_barriers();
  }
  if (threadIdx.x == 32) seldom.plan(p, blockIdx.x);
  if (threadIdx.x == 64) prefetch_map(&map);
#if NEEDS_ONES
  if (threadIdx.x == 96) write_ones();
#endif
  __syncthreads();
  wait_for_earlier_kernels();
  const volatile Seldom& rare = seldom;
  volatile Progress& at = progress[l.warp];
  {
    const int num_tiles = rare.num_tiles;
    Turn turn = {l.warp, l.warp, 0};
    while (turn.slot >= p.num_stages) turn.slot -= p.num_stages, turn.parity ^= 1;
    while (turn.index < min(p.num_stages, num_tiles)) turn.take(p, ring, &map, seldom, l.lane);
    if (l.lane == 0) {
      turns[l.warp] = turn;
      at.due = turn.due(p, num_tiles), at.wrap = 0, at.switch_at = rare.head_tiles - 1;
      at.range = share.first;
      at.range_end = range_start(p, share.first + 1) - range_start(p, share.first);
      at.share.block = share.block, at.share.first = share.first, at.share.last = share.last;
    }
    __syncwarp();
  }

  Accumulators acc;
  clear(acc);
  int tile = 0;
  TileOfX of_x;
  u32 full, parity = 1;
#if ROLLS
  u32 release = 0;  // of the tile whose products are still in flight
#endif
  for (;;) {
    if (tile < at.range_end) {  // a range may be empty
      int due = at.due, wrap = at.wrap, switch_at = at.switch_at;
      __syncwarp();
      if (tile == due) {
        Turn turn = turns[l.warp];
        __syncwarp();
        turn.take(p, ring, &map, seldom, l.lane);
        due = turn.due(p, rare.num_tiles);
        if (l.lane == 0) turns[l.warp] = turn, at.due = due;
      }
      if (tile == wrap) {
        wrap += p.num_stages, parity ^= 1, full = ring.full;
        of_x.x = x_descriptor(ring.x), of_x.meta = ring.meta;
        if (l.lane == 0) at.wrap = wrap;
      }
      if (tile == switch_at) {
        is_there = tile + 1 < rare.num_tiles;
        if (is_there) {
          const Share other = share_of(rare.begin, rare.end, at.share.block - 1);
          const int first_column = range_start(p, other.first);
          next = Stream(p, l, other.block * WARPS + l.warp, first_column - 1);
          switch_at += p.num_col_tiles - first_column;
          if (l.lane == 0) at.switch_at = switch_at;
        }
      }
      int stop = min((int)at.range_end, wrap);
      if (due > tile) stop = min(stop, due);
      if (switch_at > tile) stop = min(stop, switch_at);
      __syncwarp();
      do {
        next.skip();
        barrier_wait_whole(full, parity);
#if ROLLS
        multiply_tile(acc, raw, l, of_x, next, is_there, release);
        release = full + MAX_STAGES * 8;
#else
        multiply_tile(acc, raw, l, of_x, next, is_there);
        if (l.lane == 0) barrier_arrive(full + MAX_STAGES * 8);
#endif
        of_x.x += X_BYTES / 16, of_x.meta += META_BYTES, full += 8;
      } while (++tile < stop);
      if (tile < at.range_end) continue;
    }
#if ROLLS
    wgmma_wait<0>();
    hold(acc);
#endif
    Share done;
    done.block = at.share.block, done.first = at.share.first, done.last = at.share.last;
    int range = at.range;
    __syncwarp();
    end_range(p, l, acc, totals, done, range);
    if (++range == done.last) {
      const int begin = rare.begin, end = rare.end;
      if (!p.passes && (done.first > 0 || done.last < RANGES)) {
        const u32 too_few = arrive(p, done.block, done.last - done.first);
        if (threadIdx.x == 0) {
          (done.block == begin / RANGES ? seldom.too_few_of_first : seldom.too_few_of_last) = too_few;
        }
      }
      if (done.block == begin / RANGES) break;
      done = share_of(begin, end, done.block - 1);
      range = done.first;
    }
    if (l.lane == 0) {
      at.share.block = done.block, at.share.first = done.first, at.share.last = done.last;
      at.range = range;
      at.range_end = at.range_end + range_start(p, range + 1) - range_start(p, range);
    }
    __syncwarp();
  }
  if (p.passes) return;
  __syncthreads();
  if (seldom.too_few_of_first) fold(p, seldom.begin / RANGES, seldom.too_few_of_first);
  if (seldom.too_few_of_last) fold(p, (seldom.end - 1) / RANGES, seldom.too_few_of_last);
}
