// out [tokens, rows] = x [tokens, columns] times packed weights, transposed, for 17 tokens and more.
//
// A block owns WGS * 64 rows and some of the RANGES of columns; all its tokens (up to NT * 8) meet a
// weight as soon as it is decoded. Each warp streams the weights of its 16 rows straight into
// registers, DEPTH tiles ahead, and hands them to warpgroup products as operand A. They take
// turns in keeping a ring of tiles of x in shared memory. Weights do not depend on earlier kernels, so their first tiles
// are under way before those have ended.
//
// The order of a sum depends on the matrix alone, and direct.cu has the same: the RANGES of columns
// (boundaries at num_col_tiles * r / RANGES) are summed from 0, group by group, and their sums are added
// in order. Where a block owns all ranges it keeps the total in shared memory; otherwise the blocks of
// the same rows leave the ranges' sums in a workspace, wait for each other and fold a slice each.
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT   16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT    tiles of 8 tokens: 4, 8 or 16      WGS    warpgroups that multiply
//   DEPTH tiles under way to registers, AHEAD tiles further to the L2, which takes no registers
//   RANGES ranges of columns      SPLIT whether blocks share rows
//   BLOCKS of a multiprocessor, which bounds registers
//   CLUSTER 2: neighbouring blocks of rows form a cluster and fetch half of each tile of x for both

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

struct Problem {
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  float4* parts;  // [token block, row block][RANGES][ITEMS]
  u32* arrivals;  // [token block, row block]: RANGES more after every kernel
  int num_tokens, num_rows, num_row_tiles, num_col_tiles;
  int pitch, log_splits, num_stages;
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

// What this block computes: ranges [first_range, last_range), which are the tiles of columns
// [first_tile, last_tile), of row block `block`; the tokens of blockIdx.y.
struct Share {
  int block, member, rank, first_range, last_range, first_tile, last_tile, first_token;
};

DEVICE int range_start(const Problem& p, int range) { return p.num_col_tiles * range / RANGES; }

DEVICE Share my_share(const Problem& p) {
  Share s;
  const int pair = blockIdx.x / CLUSTER;
  s.member = blockIdx.x % CLUSTER;
  s.block = (pair >> p.log_splits) * CLUSTER + s.member;
  s.rank = pair & ((1 << p.log_splits) - 1);
  s.first_range = RANGES * s.rank >> p.log_splits;
  s.last_range = RANGES * (s.rank + 1) >> p.log_splits;
  s.first_tile = range_start(p, s.first_range);
  s.last_tile = range_start(p, s.last_range);
  s.first_token = blockIdx.y * TOKENS;
  return s;
}

struct Lane {
  int lane, g, t, warp;
};

// A place in the ring of x, and whether it is being used an odd time.
struct Slot {
  int index, parity;
  DEVICE void advance(int count) {
    if (++index == count) index = 0, parity ^= 1;
  }
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
  u32 scales;  // of 16 rows and all groups, spread over the warp's lanes
#if OFFSET
  u32 offsets;
#endif
#endif
};

#if BITS
DEVICE u32 load_scale_plane(const u8* base, int lane, int which) {
  const u8* plane = base + scale_at(0, 0, which);
#if GROUP == 32
  return load_once_u32(plane + lane * 4);
#else
  return load_once_u16(plane + (GROUP == 64 ? lane : lane % 16) * 2);
#endif
}

// The scale, or offset, of this lane's row g or g + 8, out of the lane that holds it.
DEVICE u32 spread(const Lane& l, u32 plane, int group, int upper) {
#if GROUP == 32
  const u32 pair = __shfl_sync(~0u, plane, group * 8 + upper * 4 + l.g / 2);
  return l.g & 1 ? pair >> 16 : pair & 0xFFFFu;
#else
  return __shfl_sync(~0u, plane, group * 16 + upper * 8 + l.g);
#endif
}
#endif

// A warp's tiles, one after the other; `left` are still to be loaded.
struct Stream {
  const u8* base;
  const u8* rest;
  int left;

  DEVICE void load_half(Raw& raw, const Lane& l, int h) const {
    if (left <= 0) return;
#if BITS == 0
#pragma unroll
    for (int i = 0; i < 4; i++) raw.pieces[h][i] = load_once(base + dense_at(h, i) + l.lane * 16);
#else
    raw.pieces[h][0] = load_once(base + nibbles_at(h) + l.lane * 16);
#if BITS >= 8
    raw.pieces[h][1] = load_once(rest + nibbles_at(h) + l.lane * 16);
#endif
#if BITS == 16
    raw.pieces[h][2] = load_once(rest + bytes_at(h, 0) + l.lane * 16);
    raw.pieces[h][3] = load_once(rest + bytes_at(h, 1) + l.lane * 16);
#endif
#endif
  }

  DEVICE void load_scales(Raw& raw, const Lane& l) const {
#if BITS
    if (left <= 0) return;
    raw.scales = load_scale_plane(base, l.lane, 0);
#if OFFSET
    raw.offsets = load_scale_plane(base, l.lane, 1);
#endif
#endif
  }

  DEVICE void advance() { base += BASE_BYTES, rest += REST_BYTES, left--; }

  // Into the L2: the tile that lies AHEAD of the next one, or all until there.
  DEVICE void fetch_ahead(const Lane& l) const {
#if AHEAD
    if (l.lane != 0 || left <= AHEAD) return;
    prefetch_l2(base + AHEAD * BASE_BYTES, BASE_BYTES);
#if REST_BYTES
    prefetch_l2(rest + AHEAD * REST_BYTES, REST_BYTES);
#endif
#endif
  }

  DEVICE void fetch_first(const Lane& l) const {
#if AHEAD
    const int count = min(left, DEPTH + AHEAD) - DEPTH;
    if (l.lane != 0 || count <= 0) return;
    prefetch_l2(base + DEPTH * BASE_BYTES, count * BASE_BYTES);
#if REST_BYTES
    prefetch_l2(rest + DEPTH * REST_BYTES, count * REST_BYTES);
#endif
#endif
  }
};

// ---- multiplication ------------------------------------------------------------------------------

typedef float Accumulators[NT][4];

// One tile of columns of x: its descriptor, and the shared address of its scales and sums.
struct TileOfX {
  u32 x, meta;
};

#if BITS
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
// Codes become signed bytes 16 (u - 8), which costs the upper nibbles nothing; a level is a sixteenth
// of what they stand for. The signed grid counts from 7 (or, at 8 bits, 16 * 7 + 8): its codes are
// raised so that the zero is 8, and what remains of other zeros is a multiple of the sum of x.
#if SIGNED
#define LEFT_OF_ZERO (BITS == 8 ? -8 : 0)
#else
#define LEFT_OF_ZERO (OFFSET ? 128 : 0)
#endif
#define NEEDS_SUM (LEFT_OF_ZERO || HAS_SHIFT)
#define NEEDS_ONES (NEEDS_SUM && GROUP < ACT_GROUP)
#define SUBTILES (NT / 4)                         // 32 tokens each
#define SUBGROUPS (64 / SUBGROUP)                 // of half a tile
#define PRODUCTS (2 * SUBGROUPS * SUBTILES)       // of a tile

DEVICE u32 raised(u32 codes) {
#if SIGNED
  return codes + 0x11111111u - ((codes >> 3) & 0x11111111u);  // c >= 8 stays, c < 8 grows by 1
#else
  return codes;
#endif
}

// (nibbles & 0xF0F0F0F0) ^ 0x80808080 in one instruction
DEVICE u32 signed_bytes(u32 nibbles) {
  u32 bytes;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(bytes) : "r"(nibbles), "r"(0xF0F0F0F0u), "r"(0x80808080u));
  return bytes;
}

DEVICE void signed_bytes_of(u32 (&a)[4], u32 first, u32 second) {
  a[0] = signed_bytes(first << 4), a[1] = signed_bytes(first);
  a[2] = signed_bytes(second << 4), a[3] = signed_bytes(second);
}

// Integer products of a subgroup of columns and 32 tokens.
struct IntegerProduct {
  int d[4][4];
#if NEEDS_ONES
  int ones[4][4];
#endif
};

DEVICE void add_product(Accumulators& acc, IntegerProduct& of, const Lane& l, u32 meta, int subtile,
                        const float (&scale)[2], const float (&shift)[2]) {
  hold(of.d);
#if NEEDS_ONES
  hold(of.ones);
#endif
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const uint4 m = load_shared4(meta + ((subtile * 4 + n) * 8 + 2 * l.t) * 8);
    const float xs[2] = {__uint_as_float(m.x), __uint_as_float(m.z)};
#if NEEDS_ONES
    const int sum[2] = {of.ones[n][0], of.ones[n][1]};
#else
    const int sum[2] = {(int)m.y, (int)m.w};
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float& to = acc[subtile * 4 + n][i];
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
                          const Stream& next) {
  float scale[GROUPS_PER_TILE][2], shift[GROUPS_PER_TILE][2];
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      scale[group][upper] = row_scale(l, raw, group, upper) * (1.f / 16.f);
      shift[group][upper] = HAS_SHIFT ? row_shift(l, raw, group, upper) : 0.f;
    }
  }
  next.load_scales(raw, l);
  u32 a[2][2][4];
#if BITS == 8
  u32 fine[2][2][4];
#endif
  IntegerProduct product[2];
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
      next.load_half(raw, l, h);
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
        const u32 b = tile.x + (subtile * 4096 + h * 64 + at_step * 32) / 16;
        if (step == 0) wgmma_s8<false>(product[j & 1].d, a[h][at_step], b);
        else wgmma_s8<true>(product[j & 1].d, a[h][at_step], b);
#if BITS == 8
        wgmma_u8s8<true>(product[j & 1].d, fine[h][at_step], b);
#endif
#if NEEDS_ONES
        const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
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
                          const Stream& next) {
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
  next.load_scales(raw, l);
  float d[NT][4];
#if HAS_SHIFT
  float ones[NT][4];
  const u32 one[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
#endif
  u32 a[2][4][4];
#pragma unroll
  for (int at_step = 0; at_step < 8; at_step++) {
    const int h = at_step / 4, step = at_step % 4, group = at_step * 16 / GROUP;
    const bool starts = at_step * 16 % GROUP == 0, ends = (at_step + 1) * 16 % GROUP == 0;
    if (step == 0) {
      const uint4 w = raw.pieces[h][0];
      const u32 codes[4] = {w.x, w.y, w.z, w.w};
#if BITS == 8
      const uint4 e = raw.pieces[h][1];
      const u32 low[4] = {e.x, e.y, e.z, e.w};
#else
      const u32 low[4] = {0, 0, 0, 0};
#endif
#pragma unroll
      for (int i = 0; i < 4; i++) levels_of(a[h][i], codes[i], low[i]);
      next.load_half(raw, l, h);
    }
    if (step == 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) settle(a[h][i]);
    }
    if (step == 0 || starts) wgmma_begin();
    const u32 b = tile.x + (h * (X_BYTES / 2) + step * 32) / 16;
    if (starts) wgmma_bf16<false>(d, a[h][step], b);
    else wgmma_bf16<true>(d, a[h][step], b);
#if HAS_SHIFT
    if (starts) wgmma_bf16<false>(ones, one, b);
    else wgmma_bf16<true>(ones, one, b);
#endif
    if (step == 3 || ends) wgmma_commit();
    if (ends) {
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
}
#else
// The bf16 weights of half a tile as A fragments: put together from their planes, or dense ones.
DEVICE void multiply_tile(Accumulators& acc, Raw& raw, const Lane& l, const TileOfX& tile,
                          const Stream& next) {
  u32 a[2][4][4];
#if BITS == 16
  u32 scale[GROUPS_PER_TILE][2], half[GROUPS_PER_TILE][2];
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      anchor_factors(scale[group][upper], half[group][upper], spread(l, raw.scales, group, upper));
    }
  }
  next.load_scales(raw, l);
#endif
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint4 w0 = raw.pieces[h][0], w1 = raw.pieces[h][1];
    const uint4 w2 = raw.pieces[h][2], w3 = raw.pieces[h][3];
#if BITS == 0
    const uint4 w[4] = {w0, w1, w2, w3};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      a[h][step][0] = w[step].x, a[h][step][1] = w[step].y;
      a[h][step][2] = w[step].z, a[h][step][3] = w[step].w;
    }
#else
    const u32 codes[4] = {w0.x, w0.y, w0.z, w0.w}, r4[4] = {w1.x, w1.y, w1.z, w1.w};
    const u32 r8[4][2] = {{w2.x, w2.y}, {w2.z, w2.w}, {w3.x, w3.y}, {w3.z, w3.w}};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const int group = (h * 64 + step * 16) / GROUP;
      exact_of(a[h][step], codes[step], r4[step], r8[step], scale[group], half[group]);
    }
#endif
    next.load_half(raw, l, h);
#pragma unroll
    for (int step = 0; step < 4; step++) settle(a[h][step]);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; step++) {
      wgmma_bf16<true>(acc, a[h][step], tile.x + (h * (X_BYTES / 2) + step * 32) / 16);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  hold(acc);
}
#endif

DEVICE void store_shared4(u32 at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// ---- results -------------------------------------------------------------------------------------

DEVICE float bias_of(const Problem& p, int row) {
  if (p.bias_kind == 0 || row >= p.num_rows) return 0.f;
  if (p.bias_kind == 1) return bf16_to_float(((const u16*)p.bias)[row]);
  return ((const float*)p.bias)[row];
}

// Four sums of a lane: rows g and g + 8 of its warp's 16, two tokens.
DEVICE void store_sums(const Problem& p, const Share& s, const Lane& l, int n, const float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = (s.block * WARPS + l.warp) * TILE_ROWS + l.g + 8 * (i >> 1);
    const int token = s.first_token + n * 8 + 2 * l.t + (i & 1);
    if (token >= p.num_tokens || row >= p.num_rows) continue;
    const float value = sum[i] + bias_of(p, row);
    const size_t at = (size_t)token * p.num_rows + row;
    if (p.out_is_float) ((float*)p.out)[at] = value;
    else ((u16*)p.out)[at] = float_to_bf16(value);
  }
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

#if SPLIT
// The sums of a range go where the fold finds them: [range][n][thread] of four.
DEVICE void end_range(const Problem& p, const Share& s, const Lane& l, Accumulators& acc, u32 totals,
                      int range) {
  const int at = blockIdx.y * (gridDim.x >> p.log_splits) + s.block;
  float4* to = p.parts + ((size_t)at * RANGES + range) * ITEMS + threadIdx.x;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    __stcg(to + n * THREADS, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
  }
  clear(acc);
}

// Wait for the blocks of the same rows, then add up and store a slice of their sums.
DEVICE void fold(const Problem& p, const Share& s) {
  const int at = blockIdx.y * (gridDim.x >> p.log_splits) + s.block;
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 seen, mine = RANGES >> p.log_splits;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(seen)
                 : "l"(p.arrivals + at), "r"(mine)
                 : "memory");
    const u32 all = (seen / RANGES + 1) * RANGES;
    seen += mine;
    while ((int)(seen - all) < 0) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p.arrivals + at) : "memory");
    }
  }
  __syncthreads();
  const float4* from = p.parts + (size_t)at * RANGES * ITEMS;
  const int stop = ITEMS * (s.rank + 1) >> p.log_splits;
  for (int item = (ITEMS * s.rank >> p.log_splits) + threadIdx.x; item < stop; item += THREADS) {
    float4 part[RANGES];
#pragma unroll
    for (int r = 0; r < RANGES; r++) part[r] = __ldcg(from + (size_t)r * ITEMS + item);
    float sum[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
    for (int r = 1; r < RANGES; r++) {
      sum[0] += part[r].x, sum[1] += part[r].y, sum[2] += part[r].z, sum[3] += part[r].w;
    }
    store_sums(p, s, lane_of(item % THREADS), item / THREADS, sum);
  }
}
#else
// The total of the ranges so far lies in shared memory, each thread's own.
DEVICE u32 total_at(u32 totals, int n) { return totals + (n * THREADS + threadIdx.x) * 16; }

DEVICE void add_total(Accumulators& acc, u32 totals) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint4 before = load_shared4(total_at(totals, n));
    acc[n][0] = __uint_as_float(before.x) + acc[n][0];
    acc[n][1] = __uint_as_float(before.y) + acc[n][1];
    acc[n][2] = __uint_as_float(before.z) + acc[n][2];
    acc[n][3] = __uint_as_float(before.w) + acc[n][3];
  }
}

DEVICE void end_range(const Problem& p, const Share& s, const Lane& l, Accumulators& acc, u32 totals,
                      int range) {
  if (range > 0) add_total(acc, totals);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    store_shared4(total_at(totals, n), acc[n][0], acc[n][1], acc[n][2], acc[n][3]);
  }
  clear(acc);
}
#endif

// ---- x -------------------------------------------------------------------------------------------

struct Ring {
  u32 x, meta, full, empty;
};

// Box of x and bulk of meta: to this block, or to the same place in both blocks of the cluster.
DEVICE void load_box(u32 to, const TensorMap* map, int x, int y, u32 bar) {
#if CLUSTER == 1
  tensor_load(to, map, x, y, bar);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(bar), "h"((u16)3)
      : "memory");
#endif
}

DEVICE void load_meta(u32 to, const u8* from, u32 bytes, u32 bar) {
#if CLUSTER == 1
  bulk_load(to, from, bytes, bar);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "h"((u16)3)
      : "memory");
#endif
}

// This block's part of a tile: half of the tokens of int8 codes, or 64 columns of bf16.
DEVICE void fetch_x(const Problem& p, const Share& s, const Ring& ring, const TensorMap* map, int slot,
                    int tile, int lane) {
  const u32 bar = ring.full + slot * 8, to = ring.x + slot * X_BYTES;
  if (lane == 0) barrier_expect(bar, X_BYTES + META_BYTES);
  __syncwarp();
#if ACT == 8
  const int skip = s.member * (TOKENS / CLUSTER);
  if (lane == 0) load_box(to + skip * 128, map, tile * TILE_COLS, s.first_token + skip, bar);
  if (lane >= 1 && lane <= ACT_GROUPS / CLUSTER) {
    const int part = s.member * (ACT_GROUPS / CLUSTER) + lane - 1;
    const size_t group = (size_t)tile * ACT_GROUPS + part;
    load_meta(ring.meta + slot * META_BYTES + part * (TOKENS * 8),
              p.meta + (group * p.pitch + s.first_token) * 8, TOKENS * 8, bar);
  }
#else
  if (lane < 2 / CLUSTER) {
    const int half = s.member + lane;
    load_box(to + half * (X_BYTES / 2), map, tile * TILE_COLS + half * 64, s.first_token, bar);
  }
#endif
  __syncwarp();
}

// This warp has read what lies in a slot. Where nothing will follow there, no one waits for that.
DEVICE void leave_slot(const Ring& ring, int slot, int lane) {
#if CLUSTER == 1
  if (lane == 0) barrier_arrive(ring.empty + slot * 8);
#else
  if (lane < CLUSTER) barrier_arrive_remote(remote_address(ring.empty + slot * 8, lane));
#endif
}

// Tiles of x are fetched by the multiplying warps in turn: when all have read the tile LAG before this
// one, its place takes the next tile of the ring.
#define LAG 2

DEVICE void fetch_first(const Problem& p, const Share& s, const Ring& ring, const TensorMap* map,
                        const Lane& l) {
  wait_for_earlier_kernels();
  for (int i = l.warp; i < p.num_stages && s.first_tile + i < s.last_tile; i += WARPS) {
    fetch_x(p, s, ring, map, i, s.first_tile + i, l.lane);
  }
}

// A warp's next turn: at tile `due`, slot `slot` takes tile `tile`, once it is empty.
struct Turn {
  int due, slot, parity, tile;

  DEVICE void settle(const Problem& p, const Share& s) {
    while (slot >= p.num_stages) slot -= p.num_stages, parity ^= 1;
    due = tile < s.last_tile ? tile - p.num_stages + LAG : -1;
  }

  DEVICE void take(const Problem& p, const Share& s, const Ring& ring, const TensorMap* map,
                   const Lane& l) {
    barrier_wait(ring.empty + slot * 8, parity);
    fetch_x(p, s, ring, map, slot, tile, l.lane);
    slot += WARPS, tile += WARPS;
    settle(p, s);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wide(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw_bytes[];
  __shared__ u64 barriers[2 * MAX_STAGES];
  launch_dependents();
  const Share s = my_share(p);
  const Lane l = lane_of(threadIdx.x);
  Ring ring;
  ring.x = (smem_address(raw_bytes) + 1023) / 1024 * 1024;
  ring.meta = ring.x + p.num_stages * X_BYTES;
  asm volatile("mov.u32 %0, %1;" : "=r"(ring.full) : "r"(smem_address(barriers)));  // computed once
  ring.empty = ring.full + MAX_STAGES * 8;
  const u32 totals = ring.meta + p.num_stages * META_BYTES;

  // the first weights are on their way before anything else happens
  const int row_tile = s.block * WARPS + l.warp;
  const size_t first = (size_t)row_tile * p.num_col_tiles + s.first_tile;
  Stream next = {p.base + first * BASE_BYTES, p.rest + first * REST_BYTES,
                 row_tile < p.num_row_tiles ? s.last_tile - s.first_tile : 0};
  const Stream start = next;
  Raw raw[DEPTH] = {};
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    next.load_scales(raw[d], l);
    next.load_half(raw[d], l, 0);
    next.load_half(raw[d], l, 1);
    next.advance();
  }
  start.fetch_first(l);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.num_stages; i++) {
      barrier_init(ring.full + i * 8, 1);
      barrier_init(ring.empty + i * 8, WARPS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
#if CLUSTER == 1
  __syncthreads();
#else
  cluster_arrive();
  cluster_wait();
#endif
  fetch_first(p, s, ring, &map, l);

  Accumulators acc;
  clear(acc);
  Slot slot = {0, 0};
  Turn turn = {0, l.warp, 0, s.first_tile + p.num_stages + l.warp};
  turn.settle(p, s);
  int range = s.first_range, stop = range_start(p, range + 1);
  int tile = s.first_tile;
  while (tile < s.last_tile) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (tile < s.last_tile) {
        while (tile == stop) {
          end_range(p, s, l, acc, totals, range);
          stop = range_start(p, ++range + 1);
        }
        const TileOfX of_x = {x_descriptor(ring.x + slot.index * X_BYTES), ring.meta + slot.index * META_BYTES};
        if (tile == turn.due) turn.take(p, s, ring, &map, l);
        barrier_wait_whole(ring.full + slot.index * 8, slot.parity);
        next.fetch_ahead(l);
        multiply_tile(acc, raw[d], l, of_x, next);
        next.advance();
        if (tile + p.num_stages < s.last_tile) leave_slot(ring, slot.index, l.lane);
        slot.advance(p.num_stages);
        tile++;
      }
    }
  }
#if SPLIT
  for (; range < s.last_range; range++) end_range(p, s, l, acc, totals, range);
  fold(p, s);
#else
  for (; range < RANGES - 1; range++) end_range(p, s, l, acc, totals, range);
  add_total(acc, totals);
#pragma unroll
  for (int n = 0; n < NT; n++) store_sums(p, s, l, n, acc[n]);
#endif
}
