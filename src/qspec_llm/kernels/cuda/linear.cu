// out [tokens, rows] = x [tokens, columns] times packed weights, transposed; up to 128 tokens a pass.
//
// A block owns P panels side by side (16 P rows) and one of S ranges of columns; the S blocks of a
// cluster own the ranges of the same rows. One warp feeds a ring of stages in shared memory, COLS tiles
// of columns of every panel and of x at a time; the others multiply, each its own panels. Weights do
// not depend on earlier kernels, so the ring is filled before those have ended.
//
// A row of x meets the weights in an order that depends on the matrix alone: groups of columns one
// after the other within a range, then the ranges in order. The number of tokens changes only which
// instance runs (NT tiles of 8 tokens).
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT   16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT    tiles of 8 tokens      RT     panels a warp (1 or 2)
//   COLS  tiles a stage          WGMMA  products by warpgroups: RT = 1, warps a multiple of 4
//   THREADS, BLOCKS  launch bounds

#include "tile.cuh"
#if WGMMA
#include "wgmma.cuh"
#endif

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
#define X_STAGE ((COLS * (X_BYTES + META_BYTES) + 1023) / 1024 * 1024)
#define PANEL_BYTES (COLS * (BASE_BYTES + REST_BYTES))
#define MAX_STAGES 16
#if WGMMA
#define FEED_WARPS 4  // one feeds; registers are dealt out by warpgroups
// A block's registers at its start, a multiple of 8 a thread, are all there are to deal out.
#define FEED_REGISTERS 40
#define START_REGISTERS (65536 / THREADS / 8 * 8 * (THREADS / 32))
#define MULTIPLY_REGISTERS \
  ((START_REGISTERS - FEED_WARPS * FEED_REGISTERS) / (THREADS / 32 - FEED_WARPS) / 8 * 8)
#define DEALS_REGISTERS (THREADS > 256)
#else
#define FEED_WARPS 1
#define DEALS_REGISTERS 0
#endif
#define PART_TILES (NT < 4 ? NT : 4)  // token tiles that are reduced at a time
#define PART_TOKENS (PART_TILES * 8)
#define PART_STRIDE (PART_TOKENS + 2)

// Where the next linear's weights begin: the first `depth` tiles of each of its streams are fetched.
struct Ahead {
  const u8* base;
  const u8* rest;
  int base_bytes, rest_bytes, num_row_tiles, num_col_tiles, log_splits, depth;
};

struct Problem {
  const u8* x;     // row-major, for machines without a copy engine
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  int num_tokens, num_rows, num_cols, num_row_tiles, num_col_tiles;
  int pitch, log_splits, panels, num_blocks, num_stages;
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
  Ahead ahead;
};

// What this block computes: columns [first_tile, first_tile + num_tiles) of row blocks first_block,
// first_block + block_step, ...; the tokens of blockIdx.y.
struct Share {
  int rank, first_tile, num_tiles, first_block, block_step, num_steps, first_token;
};

DEVICE Share my_share(const Problem& p) {
  Share s;
  s.rank = blockIdx.x & ((1 << p.log_splits) - 1);
  s.first_tile = p.num_col_tiles * s.rank >> p.log_splits;
  s.num_tiles = (p.num_col_tiles * (s.rank + 1) >> p.log_splits) - s.first_tile;
  s.first_block = blockIdx.x >> p.log_splits;
  s.block_step = gridDim.x >> p.log_splits;
  s.num_steps = (s.num_tiles + COLS - 1) / COLS;
  s.first_token = blockIdx.y * TOKENS;
  return s;
}

// A place in a ring, and whether it is being used an odd time.
struct Slot {
  int index, parity;
  DEVICE void advance(int count) {
    if (++index == count) index = 0, parity ^= 1;
  }
};

// ---- multiplication ------------------------------------------------------------------------------

typedef float Accumulators[RT][NT][4];

struct Lane {
  int lane, g, t;
  u32 matrix_row, matrix_chunk;
};

// Shared addresses of one tile of columns: x, its scales and sums, and the weights of RT panels.
struct Tile {
  u32 x, meta, base[RT], rest[RT];
};

// Address of this lane's row for load_matrices: token tile n, 16-byte chunks from `chunk`. Rows of
// 128 bytes are swizzled: chunk i of row r lies at i ^ (r % 8).
DEVICE u32 x_at(const Lane& l, u32 x, int n, int chunk) {
  return x + n * 1024 + l.matrix_row * 128 + (((chunk + l.matrix_chunk) ^ l.matrix_row) << 4);
}

DEVICE float row_scale(const Lane& l, u32 base, int upper, int group, int which) {
  return scale_to_float(load_shared_u16(base + scale_at(group, l.g + 8 * upper, which)));
}

// Offset of the weights of a group in units of the weight: b, and the middle of 16 codes.
DEVICE float row_shift(const Lane& l, u32 base, int upper, int group) {
  float shift = 0.f;
#if OFFSET
  shift = row_scale(l, base, upper, group, 1);
#endif
#if MIDDLE
  shift += row_scale(l, base, upper, group, 0) * (7.5f / 16.f);
#endif
  return shift;
}

#if ACT == 8
// Codes of the upper rows lie in the high nibbles. With few tokens they are multiplied where they are,
// as 16 times themselves: their sums stay below 2^24, so that a scale of 1/16 makes up for it exactly.
#define UPPER_SHIFT (NT <= 2 ? 0 : 4)

// Integer products of a subgroup of columns, then one float accumulation with both scales.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, const Tile& tile) {
  const float unit = BITS == 8 ? 1.f / 16.f : 1.f;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][2][4];  // u, or its high part
#if BITS == 8
    u32 fine[RT][2][4];
#endif
#pragma unroll
    for (int p = 0; p < RT; p++) {
      const u32 at = nibbles_at(h) + l.lane * 16;
      const uint4 w = load_shared4(tile.base[p] + at);
      bytes_of(a[p][0], to_unsigned(w.x), to_unsigned(w.y), UPPER_SHIFT);
      bytes_of(a[p][1], to_unsigned(w.z), to_unsigned(w.w), UPPER_SHIFT);
#if BITS == 8
      const uint4 e = load_shared4(tile.rest[p] + at);
      bytes_of(fine[p][0], e.x, e.y, UPPER_SHIFT);
      bytes_of(fine[p][1], e.z, e.w, UPPER_SHIFT);
#endif
    }
#pragma unroll
    for (int sub = 0; sub < 64 / SUBGROUP; sub++) {
      const int column = h * 64 + sub * SUBGROUP;
      const int group = column / GROUP, act_group = column / ACT_GROUP;
      float scale[RT][2];
#if HAS_SHIFT
      float shift[RT][2];
#endif
#pragma unroll
      for (int p = 0; p < RT; p++) {
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
          scale[p][upper] = row_scale(l, tile.base[p], upper, group, 0) * unit;
          if (upper) scale[p][upper] *= 1.f / (1 << (4 - UPPER_SHIFT));
#if HAS_SHIFT
          shift[p][upper] = row_shift(l, tile.base[p], upper, group);
#endif
        }
      }
#if WGMMA
      int d[NT][4];
#if BITS == 8
      int high[NT][4];
#endif
      wgmma_begin();
#pragma unroll
      for (int step = sub; step < sub + SUBGROUP / 32; step++) {
        const u64 b = x_descriptor(tile.x + h * 64 + step * 32);
#if BITS == 8
        wgmma_u8s8(high, a[0][step], b, step > sub);
        wgmma_u8s8(d, fine[0][step], b, step > sub);
#else
        wgmma_u8s8(d, a[0][step], b, step > sub);
#endif
      }
      wgmma_commit();
      wgmma_wait<0>();
      hold(d);
#if BITS == 8
      hold(high);
#endif
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 m = load_shared4(tile.meta + (act_group * TOKENS + n * 8 + 2 * l.t) * 8);
        const float xs0 = __uint_as_float(m.x), xs1 = __uint_as_float(m.z);
        const int z0 = -LEVEL_ZERO * (int)m.y, z1 = -LEVEL_ZERO * (int)m.w;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float xs = i & 1 ? xs1 : xs0;
          int level = d[n][i] + (i & 1 ? z1 : z0);
#if BITS == 8
          level += 16 * high[n][i];
#endif
          acc[0][n][i] = fmaf((float)level, xs * scale[0][i >> 1], acc[0][n][i]);
#if HAS_SHIFT
          const float sum = (float)(int)(i & 1 ? m.w : m.y);
          acc[0][n][i] = fmaf(sum * xs, shift[0][i >> 1], acc[0][n][i]);
#endif
        }
      }
#else
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x_at(l, tile.x, n, h * 4));
        const uint4 m = load_shared4(tile.meta + (act_group * TOKENS + n * 8 + 2 * l.t) * 8);
        const float xs0 = __uint_as_float(m.x), xs1 = __uint_as_float(m.z);
        int sum[2] = {(int)m.y, (int)m.w};
#if GROUP < ACT_GROUP
        // sums of the columns that share the weight's scale: a row of ones times x
        int ones[4] = {0, 0, 0, 0};
        const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
        mma_u8s8(ones, one, b[2 * sub], b[2 * sub + 1]);
        sum[0] = ones[0];
        sum[1] = ones[1];
#endif
#pragma unroll
        for (int p = 0; p < RT; p++) {
          const int z0 = -LEVEL_ZERO * sum[0], z1 = -LEVEL_ZERO * sum[1];
          const int upper0 = z0 << (4 - UPPER_SHIFT), upper1 = z1 << (4 - UPPER_SHIFT);
#if BITS == 8
          int high[4] = {0, 0, 0, 0};
          int d[4] = {z0, z1, upper0, upper1};
#pragma unroll
          for (int step = sub; step < sub + SUBGROUP / 32; step++) {
            mma_u8s8(high, a[p][step], b[2 * step], b[2 * step + 1]);
            mma_u8s8(d, fine[p][step], b[2 * step], b[2 * step + 1]);
          }
#pragma unroll
          for (int i = 0; i < 4; i++) d[i] += 16 * high[i];
#else
          int d[4] = {z0, z1, upper0, upper1};
#pragma unroll
          for (int step = sub; step < sub + SUBGROUP / 32; step++) {
            mma_u8s8(d, a[p][step], b[2 * step], b[2 * step + 1]);
          }
#endif
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float xs = i & 1 ? xs1 : xs0;
            acc[p][n][i] = fmaf((float)d[i], xs * scale[p][i >> 1], acc[p][n][i]);
#if HAS_SHIFT
            acc[p][n][i] = fmaf((float)sum[i & 1] * xs, shift[p][i >> 1], acc[p][n][i]);
#endif
          }
        }
      }
#endif
    }
  }
}
#elif BITS == 4 || BITS == 8
// Products of bf16 x with levels, a group of columns at a time, then its scale.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, const Tile& tile) {
  const float unit = BITS == 8 ? 1.f / 16.f : 1.f;
  const int steps = GROUP / 16;
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
    u32 a[RT][steps][4];
    float scale[RT][2];
#if HAS_SHIFT
    float shift[RT][2];
#endif
#pragma unroll
    for (int p = 0; p < RT; p++) {
#pragma unroll
      for (int step = 0; step < steps; step += 2) {
        const int at_step = group * steps + step, h = at_step / 4;
        const u32 at = nibbles_at(h) + l.lane * 16 + at_step % 4 * 4;
        u32 first, second, low0 = 0, low1 = 0;
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(first), "=r"(second) : "r"(tile.base[p] + at));
#if BITS == 8
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(low0), "=r"(low1) : "r"(tile.rest[p] + at));
#endif
        levels_of(a[p][step], first, low0);
        levels_of(a[p][step + 1], second, low1);
      }
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        scale[p][upper] = row_scale(l, tile.base[p], upper, group, 0) * unit;
#if HAS_SHIFT
        shift[p][upper] = row_shift(l, tile.base[p], upper, group);
#endif
      }
    }
#if WGMMA
    float d[NT][4];
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < steps; step++) {
      const int at_step = group * steps + step, h = at_step / 4;
      const u32 x = tile.x + h * (X_BYTES / 2) + at_step % 4 * 32;
      wgmma_bf16(d, a[0][step], x_descriptor(x), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(d);
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) acc[0][n][i] = fmaf(d[n][i], scale[0][i >> 1], acc[0][n][i]);
    }
#else
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float d[RT][4] = {};
#if HAS_SHIFT
      float ones[4] = {};
      const u32 one[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
#endif
#pragma unroll
      for (int step = 0; step < steps; step += 2) {
        const int at_step = group * steps + step, h = at_step / 4;
        u32 b[4];
        load_matrices(b, x_at(l, tile.x + h * (X_BYTES / 2), n, at_step % 4 * 2));
#pragma unroll
        for (int p = 0; p < RT; p++) mma_bf16(d[p], a[p][step], b[0], b[1]);
#pragma unroll
        for (int p = 0; p < RT; p++) mma_bf16(d[p], a[p][step + 1], b[2], b[3]);
#if HAS_SHIFT
        mma_bf16(ones, one, b[0], b[1]);
        mma_bf16(ones, one, b[2], b[3]);
#endif
      }
#pragma unroll
      for (int p = 0; p < RT; p++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          acc[p][n][i] = fmaf(d[p][i], scale[p][i >> 1], acc[p][n][i]);
#if HAS_SHIFT
          acc[p][n][i] = fmaf(ones[i & 1], shift[p][i >> 1], acc[p][n][i]);
#endif
        }
      }
    }
#endif
  }
}
#else
// The bf16 weights of half a tile as A fragments: put together from their planes, or dense ones.
DEVICE void weights_of(u32 (&a)[4][4], const Lane& l, u32 base, u32 rest, int h) {
#if BITS == 0
#pragma unroll
  for (int step = 0; step < 4; step++) {
    const uint4 w = load_shared4(base + dense_at(h, step) + l.lane * 16);
    a[step][0] = w.x, a[step][1] = w.y, a[step][2] = w.z, a[step][3] = w.w;
  }
#else
  const uint4 w = load_shared4(base + nibbles_at(h) + l.lane * 16);
  const uint4 e = load_shared4(rest + nibbles_at(h) + l.lane * 16);
  const uint4 f0 = load_shared4(rest + bytes_at(h, 0) + l.lane * 16);
  const uint4 f1 = load_shared4(rest + bytes_at(h, 1) + l.lane * 16);
  const u32 codes[4] = {w.x, w.y, w.z, w.w}, r4[4] = {e.x, e.y, e.z, e.w};
  const u32 r8[4][2] = {{f0.x, f0.y}, {f0.z, f0.w}, {f1.x, f1.y}, {f1.z, f1.w}};
  u32 scale[2], half[2];
#pragma unroll
  for (int step = 0; step < 4; step++) {
    if (step % (GROUP / 16) == 0) {
      const int group = (h * 64 + step * 16) / GROUP;
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        const u32 at = base + scale_at(group, l.g + 8 * upper, 0);
        anchor_factors(scale[upper], half[upper], load_shared_u16(at));
      }
    }
    exact_of(a[step], codes[step], r4[step], r8[step], scale, half);
  }
#endif
}

#if WGMMA
// One half is decoded while the products of the other run.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, const Tile& tile) {
  u32 a[2][4][4];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    weights_of(a[h], l, tile.base[0], tile.rest[0], h);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; step++) {
      wgmma_bf16(acc[0], a[h][step], x_descriptor(tile.x + h * (X_BYTES / 2) + step * 32), 1);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  hold(acc[0]);
}
#else
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, const Tile& tile) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][4][4];
#pragma unroll
    for (int p = 0; p < RT; p++) weights_of(a[p], l, tile.base[p], tile.rest[p], h);
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        u32 b[4];
        load_matrices(b, x_at(l, tile.x + h * (X_BYTES / 2), n, step * 2));
#pragma unroll
        for (int p = 0; p < RT; p++) mma_bf16(acc[p][n], a[p][step], b[0], b[1]);
#pragma unroll
        for (int p = 0; p < RT; p++) mma_bf16(acc[p][n], a[p][step + 1], b[2], b[3]);
      }
    }
  }
}
#endif
#endif

// ---- results -------------------------------------------------------------------------------------

DEVICE void sync_consumers(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

DEVICE float bias_of(const Problem& p, int row) {
  if (p.bias_kind == 0 || row >= p.num_rows) return 0.f;
  if (p.bias_kind == 1) return bf16_to_float(((const u16*)p.bias)[row]);
  return ((const float*)p.bias)[row];
}

// Parts of sums in this block's shared memory: [rank][row of its slice][PART_STRIDE] float32. Ranks
// write theirs into the block that owns the rows, which is told when all bytes are there.
struct Exchange {
  u32 parts;
  u32 ready;   // all parts of a round are here
  u32 free;    // every block has read the parts of the round before
  int round;
};

// Add the parts of all ranges in order and store them; every block of the cluster a slice of rows.
DEVICE void finish_rows(const Problem& p, const Share& s, int row_block, bool is_last,
                        const Accumulators& acc, const Lane& l, int warp, int threads,
                        Exchange& e) {
  const int rows = p.panels * TILE_ROWS, splits = 1 << p.log_splits;
  const int slice = rows >> p.log_splits, thread = warp * 32 + l.lane;
  // neighbouring threads store neighbouring rows of one token; there are as many threads as rows
  const int my_row = thread % slice, my_token = thread / slice, tokens_at_once = threads / slice;
#pragma unroll
  for (int n0 = 0; n0 < NT; n0 += PART_TILES) {
#if HAS_BULK_COPY
    if (splits > 1 && e.round > 0) barrier_wait(e.free, (e.round - 1) & 1);
#endif
#pragma unroll
    for (int q = 0; q < RT; q++) {
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        const int row = (warp * RT + q) * TILE_ROWS + l.g + 8 * upper;
        if (row >= rows) continue;
#if HAS_BULK_COPY
        const int owner = splits > 1 ? row / slice : 0;
#else
        const int owner = 0;
#endif
        const int place = s.rank * slice + row - owner * slice;
        const u32 at = e.parts + (place * PART_STRIDE + 2 * l.t) * 4;
#if HAS_BULK_COPY
        const u32 to = splits > 1 ? remote_address(at, owner) : at;
        const u32 bar = splits > 1 ? remote_address(e.ready, owner) : 0;
#endif
#pragma unroll
        for (int n = 0; n < PART_TILES; n++) {
          const float v0 = acc[q][n0 + n][2 * upper], v1 = acc[q][n0 + n][2 * upper + 1];
#if HAS_BULK_COPY
          if (splits > 1) {
            store_remote(to + n * 32, v0, v1, bar);
            continue;
          }
#endif
          store_shared(at + n * 32, v0, v1);
        }
      }
    }
#if HAS_BULK_COPY
    if (splits > 1) barrier_wait(e.ready, e.round & 1);
    else sync_consumers(threads);
#else
    sync_consumers(threads);
#endif
    const int row_of_matrix = row_block * rows + s.rank * slice + my_row;
    const int tokens = min(PART_TOKENS, p.num_tokens - s.first_token - n0 * 8);
    const bool has_row = row_of_matrix < p.num_rows && my_token < tokens_at_once;
    const float bias = bias_of(p, row_of_matrix);
    for (int token = has_row ? my_token : tokens; token < tokens; token += tokens_at_once) {
      float sum = load_shared(e.parts + (my_row * PART_STRIDE + token) * 4);
      for (int r = 1; r < splits; r++) {
        sum += load_shared(e.parts + ((r * slice + my_row) * PART_STRIDE + token) * 4);
      }
      sum += bias;
      const size_t at = (size_t)(s.first_token + n0 * 8 + token) * p.num_rows + row_of_matrix;
      if (p.out_is_float) ((float*)p.out)[at] = sum;
      else ((u16*)p.out)[at] = float_to_bf16(sum);
    }
    sync_consumers(threads);
#if HAS_BULK_COPY
    if (splits > 1 && !(is_last && n0 + PART_TILES == NT)) {
      if (thread == 0) barrier_expect(e.ready, rows * PART_TOKENS * 4);
      if (thread < splits) barrier_arrive_remote(remote_address(e.free, thread));
    }
#endif
    e.round++;
  }
}

DEVICE Lane my_lane() {
  Lane l;
  l.lane = threadIdx.x % 32;
  l.g = l.lane / 4, l.t = l.lane % 4;
  l.matrix_row = l.lane % 8, l.matrix_chunk = l.lane / 8;
  return l;
}

DEVICE void clear(Accumulators& acc) {
#pragma unroll
  for (int p = 0; p < RT; p++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[p][n][i] = 0.f;
}

// The tiles of a stage that exist, one after the other. x and weights are the stage's addresses.
DEVICE void multiply_stage(Accumulators& acc, const Lane& l, u32 x, u32 weights, int count) {
#pragma unroll
  for (int c = 0; c < COLS; c++) {
    if (c >= count) break;
    Tile tile;
    tile.x = x + c * X_BYTES;
    tile.meta = x + COLS * X_BYTES + c * META_BYTES;
#pragma unroll
    for (int q = 0; q < RT; q++) {
      tile.base[q] = weights + q * PANEL_BYTES + c * BASE_BYTES;
      tile.rest[q] = weights + q * PANEL_BYTES + COLS * BASE_BYTES + c * REST_BYTES;
    }
    multiply_tile(acc, l, tile);
  }
}

#if HAS_BULK_COPY
// ---- feeding, with a copy engine -----------------------------------------------------------------

struct Ring {
  u32 stages, full, empty;  // barriers: 8 bytes a stage
  int stage_bytes;
};

// The feeding warp's place. Lane i copies the weights of panel i of the block.
struct Cursor {
  const u8* base;
  const u8* rest;
  int block, step, panels;
  Slot slot;

  DEVICE void enter(const Problem& p, const Share& s, int to_block, int lane) {
    block = to_block, step = 0;
    const int first = block * p.panels;
    panels = min(p.panels, p.num_row_tiles - first);
    const size_t tile = (size_t)(first + lane) * p.num_col_tiles + s.first_tile;
    base = p.base + tile * BASE_BYTES;
    rest = p.rest + tile * REST_BYTES;
  }

  DEVICE bool has_more(const Problem& p) const { return block < p.num_blocks; }

  DEVICE int count(const Share& s) const { return min(COLS, s.num_tiles - step * COLS); }

  DEVICE void advance(const Problem& p, const Share& s, int lane) {
    slot.advance(p.num_stages);
    base += COLS * BASE_BYTES, rest += COLS * REST_BYTES;
    if (++step == s.num_steps) enter(p, s, block + s.block_step, lane);
  }
};

DEVICE void feed_weights(const Cursor& c, const Share& s, const Ring& ring, int lane, u64 policy) {
  const u32 bar = ring.full + c.slot.index * 8;
  const int count = c.count(s);
  if (lane == 0) {
    barrier_expect(bar, count * (c.panels * (BASE_BYTES + REST_BYTES) + X_BYTES + META_BYTES));
  }
  __syncwarp();
  if (lane < c.panels) {
    const u32 to = ring.stages + c.slot.index * ring.stage_bytes + X_STAGE + lane * PANEL_BYTES;
    bulk_load(to, c.base, count * BASE_BYTES, bar, policy);
#if REST_BYTES
    bulk_load(to + COLS * BASE_BYTES, c.rest, count * REST_BYTES, bar, policy);
#endif
  }
  __syncwarp();
}

DEVICE void feed_x(const Cursor& c, const Problem& p, const Share& s, const Ring& ring,
                   const TensorMap* map, int lane) {
  const u32 bar = ring.full + c.slot.index * 8;
  const u32 to = ring.stages + c.slot.index * ring.stage_bytes;
  const int tile = s.first_tile + c.step * COLS, count = c.count(s);
#if ACT == 8
  if (lane < count) {
    tensor_load(to + lane * X_BYTES, map, (tile + lane) * TILE_COLS, s.first_token, bar);
  }
  const int group = lane - COLS;
  if (group >= 0 && group < count * ACT_GROUPS) {
    bulk_load(to + COLS * X_BYTES + group * TOKENS * 8,
              p.meta + ((size_t)(tile * ACT_GROUPS + group) * p.pitch + s.first_token) * 8,
              TOKENS * 8, bar);
  }
#else
  if (lane < 2 * count) {
    tensor_load(to + lane * (X_BYTES / 2), map, tile * TILE_COLS + lane * 64, s.first_token, bar);
  }
#endif
  __syncwarp();
}

// The first tiles of every stream of the next linear, into the L2.
DEVICE void prefetch_ahead(const Ahead& a, int lane) {
  const int splits = 1 << a.log_splits;
  for (int i = blockIdx.x + lane * gridDim.x; i < a.num_row_tiles * splits; i += gridDim.x * 32) {
    const int first = a.num_col_tiles * (i & (splits - 1)) >> a.log_splits;
    const size_t tile = (size_t)(i >> a.log_splits) * a.num_col_tiles + first;
    prefetch_l2(a.base + tile * a.base_bytes, a.base_bytes * a.depth);
    if (a.rest_bytes) prefetch_l2(a.rest + tile * a.rest_bytes, a.rest_bytes * a.depth);
  }
}

// Fill the ring with weights, wait until x may be read, then follow the warps that multiply.
DEVICE void feed(const Problem& p, const Share& s, const Ring& ring, const TensorMap* map,
                 int lane) {
  const u64 policy = evict_first_policy();
  Cursor weights, x;
  weights.slot = x.slot = {0, 0};
  weights.enter(p, s, s.first_block, lane);
  x.enter(p, s, s.first_block, lane);
  for (int i = 0; i < p.num_stages && weights.has_more(p); i++) {
    feed_weights(weights, s, ring, lane, policy);
    weights.advance(p, s, lane);
  }
  wait_for_earlier_kernels();
  for (int i = 0; i < p.num_stages && x.has_more(p); i++) {
    feed_x(x, p, s, ring, map, lane);
    x.advance(p, s, lane);
  }
  while (weights.has_more(p)) {
    barrier_wait(ring.empty + weights.slot.index * 8, weights.slot.parity ^ 1);
    feed_weights(weights, s, ring, lane, policy);
    feed_x(weights, p, s, ring, map, lane);
    weights.advance(p, s, lane);
  }
  if (p.ahead.depth) prefetch_ahead(p.ahead, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    linear(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw[];
  __shared__ u64 barriers[2 * MAX_STAGES + 2];
  launch_dependents();
  const int warp = threadIdx.x / 32, consumers = blockDim.x / 32 - FEED_WARPS;
  const Share s = my_share(p);
  const Lane l = my_lane();
  Ring ring;
  ring.stages = (smem_address(raw) + 1023) / 1024 * 1024;
  ring.full = smem_address(barriers), ring.empty = ring.full + MAX_STAGES * 8;
  ring.stage_bytes = X_STAGE + (consumers * RT * PANEL_BYTES + 1023) / 1024 * 1024;
  const u32 ready = ring.empty + MAX_STAGES * 8;
  if (warp == consumers && l.lane == 0) {
    for (int i = 0; i < p.num_stages; i++) {
      barrier_init(ring.full + i * 8, 1);
      barrier_init(ring.empty + i * 8, consumers);
    }
    barrier_init(ready, 1);
    barrier_init(ready + 8, 1 << p.log_splits);
    barrier_expect(ready, p.panels * TILE_ROWS * PART_TOKENS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();
  if (p.log_splits) cluster_arrive();
  __syncthreads();

  if (warp >= consumers) {
#if DEALS_REGISTERS
    // registers go from the warpgroup of the feeding warp to those that multiply
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEED_REGISTERS));
#endif
    if (warp == consumers) feed(p, s, ring, &map, l.lane);
    if (p.log_splits) cluster_wait();
    return;
  }
#if DEALS_REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
#endif
  Exchange e = {ring.stages + p.num_stages * ring.stage_bytes, ready, ready + 8, 0};
  Slot slot = {0, 0};
  for (int block = s.first_block; block < p.num_blocks; block += s.block_step) {
    const bool has_rows = warp * RT < p.panels && block * p.panels + warp * RT < p.num_row_tiles;
    Accumulators acc;
    clear(acc);
    int left = s.num_tiles;
    for (int step = 0; step < s.num_steps; step++, left -= COLS) {
      const u32 x = ring.stages + slot.index * ring.stage_bytes;
      barrier_wait(ring.full + slot.index * 8, slot.parity);
      if (has_rows || WGMMA) {
        multiply_stage(acc, l, x, x + X_STAGE + warp * RT * PANEL_BYTES, left);
      }
      __syncwarp();
      if (l.lane == 0) barrier_arrive(ring.empty + slot.index * 8);
      slot.advance(p.num_stages);
    }
    if (block == s.first_block) {
      wait_for_earlier_kernels();
      if (p.log_splits) cluster_wait();
    }
    finish_rows(p, s, block, block + s.block_step >= p.num_blocks, acc, l, warp, consumers * 32, e);
  }
}

#else
// ---- feeding with asynchronous copies by every thread (sm_80, sm_89) -----------------------------

#define RING 3

DEVICE void fetch(const Problem& p, const Share& s, u32 stage, int block, int tile) {
  const u32 weights = stage + X_STAGE;
  const int first = block * p.panels, panels = min(p.panels, p.num_row_tiles - first);
  for (int i = threadIdx.x; i < panels * (BASE_BYTES / 16); i += blockDim.x) {
    const int q = i / (BASE_BYTES / 16), at = i % (BASE_BYTES / 16) * 16;
    const size_t from = (size_t)(first + q) * p.num_col_tiles + tile;
    copy16(weights + q * PANEL_BYTES + at, p.base + from * BASE_BYTES + at, true);
  }
#if REST_BYTES
  for (int i = threadIdx.x; i < panels * (REST_BYTES / 16); i += blockDim.x) {
    const int q = i / (REST_BYTES / 16), at = i % (REST_BYTES / 16) * 16;
    const size_t from = (size_t)(first + q) * p.num_col_tiles + tile;
    copy16(weights + q * PANEL_BYTES + BASE_BYTES + at, p.rest + from * REST_BYTES + at, true);
  }
#endif
  // rows of 128 bytes, swizzled; bf16 rows come in two halves of 64 columns
  const int row_bytes = p.num_cols * (ACT == 8 ? 1 : 2), column = tile * (ACT == 8 ? 128 : 256);
  for (int i = threadIdx.x; i < X_BYTES / 16; i += blockDim.x) {
    const int half = i / (TOKENS * 8), row = i / 8 % TOKENS, chunk = i % 8;
    const int from = column + half * 128 + chunk * 16, token = s.first_token + row;
    const bool is_inside = token < p.num_tokens && from < row_bytes;
    const u8* at = p.x + (is_inside ? (size_t)token * row_bytes + from : 0);
    copy16(stage + half * TOKENS * 128 + row * 128 + ((chunk ^ row % 8) << 4), at, is_inside);
  }
#if META_BYTES
  for (int i = threadIdx.x; i < META_BYTES / 16; i += blockDim.x) {
    const int group = i / (TOKENS / 2), at = i % (TOKENS / 2) * 16;
    const u8* from = p.meta + ((size_t)(tile * ACT_GROUPS + group) * p.pitch + s.first_token) * 8;
    copy16(stage + X_BYTES + i * 16, from + at, true);
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    linear(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw[];
  const int warp = threadIdx.x / 32, consumers = blockDim.x / 32;
  const Share s = my_share(p);
  const u32 ring = (smem_address(raw) + 1023) / 1024 * 1024;
  const u32 bytes = X_STAGE + (p.panels * PANEL_BYTES + 1023) / 1024 * 1024;
  const Lane l = my_lane();
  Exchange e = {ring + RING * bytes, 0, 0, 0};
  int next_block = s.first_block, next_tile = 0;
  for (int i = 0; i < RING - 1; i++) {
    if (next_block < p.num_blocks) fetch(p, s, ring + i * bytes, next_block, next_tile);
    copy_commit();
    if (++next_tile == s.num_tiles) next_tile = 0, next_block += s.block_step;
  }
  Slot slot = {0, 0}, free_slot = {RING - 1, 0};
  for (int block = s.first_block; block < p.num_blocks; block += s.block_step) {
    const bool has_rows = warp * RT < p.panels && block * p.panels + warp * RT < p.num_row_tiles;
    Accumulators acc;
    clear(acc);
    for (int tile = 0; tile < s.num_tiles; tile++) {
      copy_wait<RING - 2>();
      __syncthreads();
      if (next_block < p.num_blocks) {
        fetch(p, s, ring + free_slot.index * bytes, next_block, next_tile);
        if (++next_tile == s.num_tiles) next_tile = 0, next_block += s.block_step;
      }
      copy_commit();
      free_slot.advance(RING);
      const u32 stage = ring + slot.index * bytes;
      if (has_rows) multiply_stage(acc, l, stage, stage + X_STAGE + warp * RT * PANEL_BYTES, 1);
      slot.advance(RING);
    }
    finish_rows(p, s, block, block + s.block_step >= p.num_blocks, acc, l, warp, consumers * 32, e);
  }
}
#endif
