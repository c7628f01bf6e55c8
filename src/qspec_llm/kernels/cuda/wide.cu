// out [tokens, rows] = x [tokens, columns] times packed weights, transposed, for 17 tokens and more.
//
// A block of rows is WGS * 64 of them; all tokens of a block (up to NT * 8) meet a weight as soon as it
// is decoded. Each warp streams the weights of its 16 rows straight into registers, a tile ahead, and
// hands them to warpgroup products as operand A. The warps take turns in keeping a ring of tiles of x in
// shared memory. Weights do not depend on earlier kernels, so the first are under way before those end.
//
// The order of a sum depends on the matrix alone, and direct.cu has the same: the columns are cut into
// RANGES, range r from tile num_col_tiles * r / RANGES on; a range is summed from 0, group by group, and
// the ranges' sums are added in order. Work is dealt out in units of one range of one block of rows:
// a thread block takes the next so many, in order. Of the rows that it has from range 0 on it keeps the
// total in shared memory; the sums of other ranges, and totals that lack later ranges, go to a
// workspace. Those who share rows wait for each other at their end and fold a slice each.
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT   16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT    tiles of 8 tokens: 4, 8 or 16      WGS    warpgroups      RANGES ranges of columns

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
  u32* arrivals;  // [token block, row block]: ranges whose sums are there, RANGES more every time
  int num_tokens, num_rows, num_row_tiles, num_col_tiles;
  int pitch, num_units, num_stages;
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

DEVICE int range_start(const Problem& p, int range) { return p.num_col_tiles * range / RANGES; }

// The first unit of thread block i, and the thread block of a unit.
DEVICE int first_unit(const Problem& p, int i) { return (int)((long long)p.num_units * i / gridDim.x); }

DEVICE int owner_of(const Problem& p, int unit) {
  return (int)(((long long)(unit + 1) * gridDim.x - 1) / p.num_units);
}

// Tiles before a unit, counted through all blocks of rows.
DEVICE int tiles_before(const Problem& p, int unit) {
  return unit / RANGES * p.num_col_tiles + range_start(p, unit % RANGES);
}

// Where the sums of a block of rows lie in the workspace.
DEVICE int place_of(const Problem& p, int block) {
  return blockIdx.y * (p.num_units / RANGES) + block;
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

// A warp's tiles in order, from block of rows to block of rows: where this lane reads the next one.
struct Stream {
  const u8* base;
  const u8* scales;
  const u8* rest;

  DEVICE Stream(const Problem& p, const Lane& l, int row_tile, int column) {
    const size_t tile = (size_t)row_tile * p.num_col_tiles + column;
    base = p.base + tile * BASE_BYTES + l.lane * 16;
    rest = p.rest + tile * REST_BYTES + l.lane * 16;
    scales = p.base + tile * BASE_BYTES;
#if BITS
    scales += scale_at(0, 0, 0) + (GROUP == 32 ? l.lane * 4 : (GROUP == 64 ? l.lane : l.lane % 16) * 2);
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
#if GROUP == 32
    raw.scales = load_once_u32(scales);
#else
    raw.scales = load_once_u16(scales);
#endif
#if OFFSET
#if GROUP == 32
    raw.offsets = load_once_u32(scales + GROUPS_PER_TILE * 32);
#else
    raw.offsets = load_once_u16(scales + GROUPS_PER_TILE * 32);
#endif
#endif
#endif
  }

  DEVICE void skip(size_t tiles) {
    base += tiles * BASE_BYTES, scales += tiles * BASE_BYTES, rest += tiles * REST_BYTES;
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
  const u32 one[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
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
                          const Stream& next, bool is_there) {
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
    if (pair >= 2) wgmma_wait<1>();  // the registers of the pair before the last are free
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

// A range of a block of rows is summed. This thread block has ranges [first, last) of those rows.
DEVICE void end_range(const Problem& p, const Lane& l, Accumulators& acc, u32 totals, int block,
                      int range, int first, int last) {
  if (first == 0 && range > 0) add_total(acc, totals);
  if (first == 0 && range + 1 < last) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
      store_shared4(total_at(totals, n), acc[n][0], acc[n][1], acc[n][2], acc[n][3]);
    }
  } else if (first == 0 && last == RANGES) {
    float bias[2];
    bias_of_rows(bias, p, block, l);
#pragma unroll
    for (int n = 0; n < NT; n++) store_sums(p, block, l, n, acc[n], bias);
  } else {  // a total takes the place of range 0
    const size_t at = (size_t)place_of(p, block) * RANGES + (first == 0 ? 0 : range);
    float4* to = p.parts + at * ITEMS + threadIdx.x;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      __stcg(to + n * THREADS, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    }
  }
  clear(acc);
}

// This block's sums of `count` ranges of some rows are in the workspace. Thread 0 gets the count that
// says that all ranges are.
DEVICE u32 arrive(const Problem& p, int block, u32 count) {
  __syncthreads();
  u32 seen = 0;
  if (threadIdx.x == 0) {
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(seen)
                 : "l"(p.arrivals + place_of(p, block)), "r"(count)
                 : "memory");
  }
  return (seen / RANGES + 1) * RANGES;
}

// Wait for all ranges of a block of rows, then add them up and store this thread block's slice.
DEVICE void fold(const Problem& p, int block, u32 all) {
  if (threadIdx.x == 0) {
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(seen)
                   : "l"(p.arrivals + place_of(p, block))
                   : "memory");
    } while ((int)(seen - all) < 0);
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
  int begin, end, num_tiles;     // units, and their tiles
  u32 all_of_first, all_of_last;  // arrivals to wait for, of rows that others share
};

// The tiles of x of a thread block are fetched by its warps in turn. A warp's next turn: when all have
// read the tile LAG before tile `due`, tile number `index` of all takes its place.
#define LAG 2

struct Turn {
  int index, column, slot, parity;

  // At which tile; never if there are no more tiles.
  DEVICE int due(const Problem& p, int num_tiles) const {
    return index < num_tiles ? index - p.num_stages + LAG : -1;
  }

  DEVICE void take(const Problem& p, const Ring& ring, const TensorMap* map, int lane) {
    if (index >= p.num_stages) barrier_wait(ring.empty + slot * 8, parity ^ 1);
    fetch_x(p, ring, map, slot, column, lane);
    index += WARPS, column += WARPS, slot += WARPS;
    wrap(p);
  }

  DEVICE void wrap(const Problem& p) {
    while (slot >= p.num_stages) slot -= p.num_stages, parity ^= 1;
    while (column >= p.num_col_tiles) column -= p.num_col_tiles;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wide(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw_bytes[];
  __shared__ u64 barriers[2 * MAX_STAGES];
  __shared__ Seldom seldom_there;
  __shared__ Turn turns_there[WARPS];
  volatile Seldom& seldom = seldom_there;
  launch_dependents();
  const Lane l = lane_of(threadIdx.x);
  Ring ring;
  ring.x = (smem_address(raw_bytes) + 1023) / 1024 * 1024;
  ring.meta = ring.x + p.num_stages * X_BYTES;
  asm volatile("mov.u32 %0, %1;" : "=r"(ring.full) : "r"(smem_address(barriers)));  // computed once
  ring.empty = ring.full + MAX_STAGES * 8;

  int unit = first_unit(p, blockIdx.x), due, jump, limit;
  const int first_column = range_start(p, unit % RANGES);
  Stream next(p, l, unit / RANGES * WARPS + l.warp, first_column);
  Raw raw = {};
  {
    const int end = first_unit(p, blockIdx.x + 1);
    const int num_tiles = tiles_before(p, end) - tiles_before(p, unit);
    // Rows beyond the matrix have no weights; what is multiplied for them is not stored.
    limit = unit / RANGES * WARPS + l.warp < p.num_row_tiles ? num_tiles : 0;
    jump = p.num_col_tiles - first_column;  // the tile from which on `next` is in the next block of rows
    // the first weights are on their way before anything else happens
    next.load_scales(raw, 0 < limit);
    next.load_half(raw, 0 < limit, 0);
    next.load_half(raw, 0 < limit, 1);
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.num_stages; i++) {
        barrier_init(ring.full + i * 8, 1);
        barrier_init(ring.empty + i * 8, WARPS);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      seldom.begin = unit, seldom.end = end, seldom.num_tiles = num_tiles;
      seldom.all_of_first = seldom.all_of_last = 0;
    }
    __syncthreads();
    wait_for_earlier_kernels();
    Turn turn = {l.warp, first_column + l.warp, l.warp, 0};
    turn.wrap(p);
    while (turn.index < min(p.num_stages, num_tiles)) turn.take(p, ring, &map, l.lane);
    due = turn.due(p, num_tiles);
    if (l.lane == 0) turns_there[l.warp] = turn;
    __syncwarp();
  }

  Accumulators acc;
  clear(acc);
  Slot slot = {0, 0};
  int tile = 0;
  do {
    int stop = tile + range_start(p, unit % RANGES + 1) - range_start(p, unit % RANGES);
    for (; tile < stop; tile++) {
      if (tile == due) {
        Turn turn = turns_there[l.warp];
        __syncwarp();
        turn.take(p, ring, &map, l.lane);
        due = turn.due(p, seldom.num_tiles);
        if (l.lane == 0) turns_there[l.warp] = turn;
        __syncwarp();
      }
      next.skip(1);
      if (tile + 1 == jump) {
        const int row_tile = (unit / RANGES + 1) * WARPS + l.warp;
        next.skip((size_t)(WARPS - 1) * p.num_col_tiles);
        limit = row_tile < p.num_row_tiles ? limit : 0;
        jump += p.num_col_tiles;
      }
      const TileOfX of_x = {x_descriptor(ring.x + slot.index * X_BYTES), ring.meta + slot.index * META_BYTES};
      barrier_wait_whole(ring.full + slot.index * 8, slot.parity);
      multiply_tile(acc, raw, l, of_x, next, tile + 1 < limit);
      if (l.lane == 0) barrier_arrive(ring.empty + slot.index * 8);
      slot.advance(p.num_stages);
    }
    const int block = unit / RANGES, range = unit % RANGES, begin = seldom.begin, end = seldom.end;
    const int first = max(begin - block * RANGES, 0), last = min(end - block * RANGES, RANGES);
    end_range(p, l, acc, ring.meta + p.num_stages * META_BYTES, block, range, first, last);
    unit++;
    if (range + 1 == last && (first > 0 || last < RANGES)) {
      const u32 all = arrive(p, block, last - first);
      if (threadIdx.x == 0) (block == begin / RANGES ? seldom.all_of_first : seldom.all_of_last) = all;
    }
  } while (unit < seldom.end);
  __syncthreads();
  if (seldom.all_of_first) fold(p, seldom.begin / RANGES, seldom.all_of_first);
  if (seldom.all_of_last) fold(p, (seldom.end - 1) / RANGES, seldom.all_of_last);
}
