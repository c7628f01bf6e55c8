// out [tokens, rows] = x [tokens, columns] times packed weights, transposed; up to 128 tokens a pass.
//
// A block owns `T` tiles side by side (32 T rows) and one of S ranges of columns; the S blocks of a
// cluster own the ranges of the same rows. Blocks go through their units one tile of columns at a
// time: one warp feeds a ring of stages, the others multiply. Weights do not depend on earlier
// kernels, so the ring is filled before those have ended.
//
// A row of x meets the weights in an order that depends on the matrix alone: groups of columns one
// after the other within a range, then the ranges in order. The number of tokens changes only which
// instance runs (NT tiles of 8 tokens).
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT  16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT   tiles of 8 tokens       RT  panels of 16 rows a warp (1 or 2)
//   THREADS, BLOCKS  launch bounds

#include "tile.cuh"

#define TOKENS (NT * 8)
#if ACT == 8
#define X_BYTES (TOKENS * 128)
#define ACT_GROUPS (TILE_COLS / ACT_GROUP)
#define META_BYTES (ACT_GROUPS * TOKENS * 8)
#define SUBGROUP (GROUP < ACT_GROUP ? GROUP : ACT_GROUP)
#else
#define X_BYTES (TOKENS * 256)
#define META_BYTES 0
#endif
#define MAX_STAGES 16
#define PART_TILES (NT < 4 ? NT : 4)  // token tiles that are reduced at a time
#define PART_TOKENS (PART_TILES * 8)

// Where the next linear's weights begin, for prefetching the first `depth` tiles of each of its streams.
struct Ahead {
  const u8* base;
  const u8* rest;
  int base_bytes, rest_bytes, num_row_tiles, num_col_tiles, splits, depth;
};

struct Problem {
  const u8* x;       // row-major, for machines without a copy engine
  const u8* meta;    // [groups][pitch] {float scale, int sum}
  const u8* base;    // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;    // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  int num_tokens, num_rows, num_cols, num_row_tiles, num_col_tiles;
  int pitch, splits, tiles_per_block, num_stages;
  int bias_kind;     // 0 none, 1 bf16, 2 float32
  int out_is_float;
  Ahead ahead;
};

// What this block computes: its range of column tiles and its units (row block, token tile).
struct Share {
  int first_tile, num_tiles, rank, first_unit, unit_step, num_units, token_tiles;
};

DEVICE Share my_share(const Problem& p) {
  Share s;
  s.rank = blockIdx.x % p.splits;
  s.first_tile = (long long)p.num_col_tiles * s.rank / p.splits;
  s.num_tiles = (long long)p.num_col_tiles * (s.rank + 1) / p.splits - s.first_tile;
  s.token_tiles = (p.num_tokens + TOKENS - 1) / TOKENS;
  const int row_blocks = (p.num_row_tiles + p.tiles_per_block - 1) / p.tiles_per_block;
  const int units = row_blocks * s.token_tiles;
  s.first_unit = blockIdx.x / p.splits;
  s.unit_step = gridDim.x / p.splits;
  s.num_units = s.first_unit < units ? (units - s.first_unit + s.unit_step - 1) / s.unit_step : 0;
  return s;
}

struct Unit {
  int row_tile, tiles_here, token;
};

DEVICE Unit unit_of(const Problem& p, const Share& s, int index) {
  const int unit = s.first_unit + index * s.unit_step;
  Unit u;
  u.row_tile = unit / s.token_tiles * p.tiles_per_block;
  u.tiles_here = min(p.tiles_per_block, p.num_row_tiles - u.row_tile);
  u.token = unit % s.token_tiles * TOKENS;
  return u;
}

// A stage: x, then base of every tile, then rest of every tile, then meta.
DEVICE u32 stage_bytes(int tiles) {
  return (X_BYTES + tiles * (BASE_BYTES + REST_BYTES) + META_BYTES + 1023) / 1024 * 1024;
}

// ---- multiplication ------------------------------------------------------------------------------

typedef float Accumulators[RT][NT][4];

struct Lane {
  int lane, g, t, panel;  // panel: the first of this warp's panels in its tile
  u32 matrix_row, matrix_chunk;
};

// Address of this lane's row for load_matrices: token tile n, 16-byte chunks from `chunk`. Rows of
// 128 bytes are swizzled: chunk i of row r lies at i ^ (r % 8).
DEVICE u32 x_at(const Lane& l, u32 x, int n, int chunk) {
  return x + n * 1024 + l.matrix_row * 128 + (((chunk + l.matrix_chunk) ^ l.matrix_row) << 4);
}

DEVICE float row_scale(const Lane& l, u32 base, int p, int upper, int group, int which) {
  const int row = (l.panel + p) * 16 + l.g + 8 * upper;
  return scale_to_float(load_shared_u16(base + scale_at(group, row, which)));
}

// Offset of the weights of a group in units of the weight: b, and the middle of 16 codes.
DEVICE float row_shift(const Lane& l, u32 base, int p, int upper, int group) {
  float shift = 0.f;
#if OFFSET
  shift = row_scale(l, base, p, upper, group, 1);
#endif
#if MIDDLE
  shift += row_scale(l, base, p, upper, group, 0) * (7.5f / 16.f);
#endif
  return shift;
}

#if ACT == 8
// Integer products of a subgroup of columns, then one float accumulation with both scales.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, u32 x, u32 base, u32 rest, u32 meta) {
  const float unit = BITS == 8 ? 1.f / 16.f : 1.f;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][2][4];  // u, or its high part
#if BITS == 8
    u32 fine[RT][2][4];
#endif
#pragma unroll
    for (int p = 0; p < RT; p++) {
      const u32 at = nibbles_at(h, l.panel + p) + l.lane * 16;
      const uint4 w = load_shared4(base + at);
      bytes_of(a[p][0], to_unsigned(w.x), to_unsigned(w.y));
      bytes_of(a[p][1], to_unsigned(w.z), to_unsigned(w.w));
#if BITS == 8
      const uint4 e = load_shared4(rest + at);
      bytes_of(fine[p][0], e.x, e.y);
      bytes_of(fine[p][1], e.z, e.w);
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
          scale[p][upper] = row_scale(l, base, p, upper, group, 0) * unit;
#if HAS_SHIFT
          shift[p][upper] = row_shift(l, base, p, upper, group);
#endif
        }
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x_at(l, x, n, h * 4));
        const uint4 m = load_shared4(meta + (act_group * TOKENS + n * 8 + 2 * l.t) * 8);
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
#if BITS == 8
          int high[4] = {0, 0, 0, 0};
          int d[4] = {z0, z1, z0, z1};
#pragma unroll
          for (int step = sub; step < sub + SUBGROUP / 32; step++) {
            mma_u8s8(high, a[p][step], b[2 * step], b[2 * step + 1]);
            mma_u8s8(d, fine[p][step], b[2 * step], b[2 * step + 1]);
          }
#pragma unroll
          for (int i = 0; i < 4; i++) d[i] += 16 * high[i];
#else
          int d[4] = {z0, z1, z0, z1};
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
    }
  }
}
#elif BITS == 4 || BITS == 8
// Products of bf16 x with levels, a group of columns at a time, then its scale.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, u32 x, u32 base, u32 rest, u32 meta) {
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
        const u32 at = nibbles_at(h, l.panel + p) + l.lane * 16 + at_step % 4 * 4;
        u32 first, second, low0 = 0, low1 = 0;
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(first), "=r"(second) : "r"(base + at));
#if BITS == 8
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(low0), "=r"(low1) : "r"(rest + at));
#endif
        levels_of(a[p][step], first, low0);
        levels_of(a[p][step + 1], second, low1);
      }
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        scale[p][upper] = row_scale(l, base, p, upper, group, 0) * unit;
#if HAS_SHIFT
        shift[p][upper] = row_shift(l, base, p, upper, group);
#endif
      }
    }
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
        load_matrices(b, x_at(l, x + h * (X_BYTES / 2), n, at_step % 4 * 2));
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
  }
}
#else
// Products of bf16 x with bf16 weights: exact ones put together from their planes, or dense ones.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, u32 x, u32 base, u32 rest, u32 meta) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][4][4];
#pragma unroll
    for (int p = 0; p < RT; p++) {
#if BITS == 0
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const uint4 w = load_shared4(base + dense_at(h, l.panel + p, step) + l.lane * 16);
        a[p][step][0] = w.x;
        a[p][step][1] = w.y;
        a[p][step][2] = w.z;
        a[p][step][3] = w.w;
      }
#else
      const uint4 w = load_shared4(base + nibbles_at(h, l.panel + p) + l.lane * 16);
      const uint4 e = load_shared4(rest + nibbles_at(h, l.panel + p) + l.lane * 16);
      const uint4 f0 = load_shared4(rest + bytes_at(h, l.panel + p, 0) + l.lane * 16);
      const uint4 f1 = load_shared4(rest + bytes_at(h, l.panel + p, 1) + l.lane * 16);
      const u32 codes[4] = {w.x, w.y, w.z, w.w}, r4[4] = {e.x, e.y, e.z, e.w};
      const u32 r8[4][2] = {{f0.x, f0.y}, {f0.z, f0.w}, {f1.x, f1.y}, {f1.z, f1.w}};
      u32 scale[2], half[2];
#pragma unroll
      for (int step = 0; step < 4; step++) {
        if (step % (GROUP / 16) == 0) {
          const int group = (h * 64 + step * 16) / GROUP;
#pragma unroll
          for (int upper = 0; upper < 2; upper++) {
            const int row = (l.panel + p) * 16 + l.g + 8 * upper;
            anchor_factors(scale[upper], half[upper],
                           load_shared_u16(base + scale_at(group, row, 0)));
          }
        }
        exact_of(a[p][step], codes[step], r4[step], r8[step], scale, half);
      }
#endif
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        u32 b[4];
        load_matrices(b, x_at(l, x + h * (X_BYTES / 2), n, step * 2));
#pragma unroll
        for (int p = 0; p < RT; p++) mma_bf16(acc[p][n], a[p][step], b[0], b[1]);
#pragma unroll
        for (int p = 0; p < RT; p++) mma_bf16(acc[p][n], a[p][step + 1], b[2], b[3]);
      }
    }
  }
}
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

// Four neighbouring rows of the matrix for one token.
DEVICE void store_row(const Problem& p, int token, int row, const float (&v)[4]) {
  const size_t at = (size_t)token * p.num_rows + row;
  if (p.num_rows % 4 == 0) {
    if (row >= p.num_rows) return;
    if (p.out_is_float) {
      *(float4*)(p.out + at * 4) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      const u32 lo = float_to_bf16(v[0]) | float_to_bf16(v[1]) << 16;
      const u32 hi = float_to_bf16(v[2]) | float_to_bf16(v[3]) << 16;
      *(uint2*)(p.out + at * 2) = make_uint2(lo, hi);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (row + i >= p.num_rows) return;
    if (p.out_is_float) ((float*)p.out)[at + i] = v[i];
    else ((u16*)p.out)[at + i] = float_to_bf16(v[i]);
  }
}

struct Exchange {
  u32 part;         // [PART_TOKENS][rows + 4] float32: this block's sums over its columns
  u32 ready, free;  // barriers of the cluster: all parts are written; all have been read
  u32 parity;
};

// Add the parts of all ranges in order and store them; every block of the cluster a slice of rows.
DEVICE void finish_unit(const Problem& p, const Share& s, const Unit& u, const Accumulators& acc,
                        const Lane& l, int warp, int threads, Exchange& e) {
  const int rows = p.tiles_per_block * TILE_ROWS, stride = rows + 4;
  const int thread = warp * 32 + l.lane, first_row = warp * RT * 16;
  const int slice = rows / p.splits, slice_row = s.rank * slice;
#pragma unroll
  for (int n0 = 0; n0 < NT; n0 += PART_TILES) {
#if HAS_BULK_COPY
    if (p.splits > 1) barrier_wait_cluster(e.free, e.parity ^ 1);
#endif
#pragma unroll
    for (int n = 0; n < PART_TILES; n++) {
#pragma unroll
      for (int q = 0; q < RT; q++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int token = n * 8 + 2 * l.t + (i & 1), row = first_row + q * 16 + l.g + 8 * (i >> 1);
          store_shared(e.part + (token * stride + row) * 4, acc[q][n0 + n][i]);
        }
      }
    }
    sync_consumers(threads);
#if HAS_BULK_COPY
    if (p.splits > 1) {
      if (thread < p.splits) {
        asm volatile("fence.acq_rel.cluster;" ::: "memory");
        barrier_arrive_remote(remote_address(e.ready, thread));
      }
      barrier_wait_cluster(e.ready, e.parity);
    }
#endif
    const int quads = slice / 4;
    for (int item = thread; item < quads * PART_TOKENS; item += threads) {
      const int token = item / quads, row = slice_row + item % quads * 4;
      const u32 at = e.part + (token * stride + row) * 4;
      float v[4];
#if HAS_BULK_COPY
      float4 sum = load_remote4(remote_address(at, 0));
      for (int r = 1; r < p.splits; r++) {
        const float4 more = load_remote4(remote_address(at, r));
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
#else
      const uint4 sum = load_shared4(at);
      v[0] = __uint_as_float(sum.x), v[1] = __uint_as_float(sum.y);
      v[2] = __uint_as_float(sum.z), v[3] = __uint_as_float(sum.w);
#endif
      const int row_of_matrix = u.row_tile * TILE_ROWS + row;
      const int token_of_x = u.token + n0 * 8 + token;
      if (token_of_x >= p.num_tokens) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] += bias_of(p, row_of_matrix + i);
      store_row(p, token_of_x, row_of_matrix, v);
    }
    sync_consumers(threads);
#if HAS_BULK_COPY
    if (p.splits > 1 && thread < p.splits) {
      barrier_arrive_remote(remote_address(e.free, thread));
    }
#endif
    e.parity ^= 1;
  }
}

DEVICE Lane my_lane(int warp) {
  Lane l;
  l.lane = threadIdx.x % 32;
  l.g = l.lane / 4, l.t = l.lane % 4;
  l.panel = RT == 1 ? warp % 2 : 0;
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

#if HAS_BULK_COPY
// ---- feeding, with a copy engine -----------------------------------------------------------------

struct Ring {
  u32 stages, bytes, full, empty;  // barriers: 8 bytes a stage
};

DEVICE void feed_weights(const Problem& p, const Share& s, const Ring& ring, int index, int lane,
                         u64 policy) {
  const int slot = index % p.num_stages;
  const Unit u = unit_of(p, s, index / s.num_tiles);
  const u32 bar = ring.full + slot * 8;
  if (lane == 0) {
    barrier_expect(bar, u.tiles_here * (BASE_BYTES + REST_BYTES) + X_BYTES + META_BYTES);
  }
  __syncwarp();
  if (lane >= u.tiles_here) return;
  const size_t tile =
      (size_t)(u.row_tile + lane) * p.num_col_tiles + s.first_tile + index % s.num_tiles;
  const u32 to = ring.stages + slot * ring.bytes + X_BYTES;
  bulk_load(to + lane * BASE_BYTES, p.base + tile * BASE_BYTES, BASE_BYTES, bar, policy);
#if REST_BYTES
  bulk_load(to + p.tiles_per_block * BASE_BYTES + lane * REST_BYTES, p.rest + tile * REST_BYTES,
            REST_BYTES, bar, policy);
#endif
}

DEVICE void feed_x(const Problem& p, const Share& s, const Ring& ring, const TensorMap* map,
                   int index, int lane) {
  const int slot = index % p.num_stages;
  const Unit u = unit_of(p, s, index / s.num_tiles);
  const u32 bar = ring.full + slot * 8, to = ring.stages + slot * ring.bytes;
  const int tile = s.first_tile + index % s.num_tiles;
#if ACT == 8
  if (lane == 0) tensor_load(to, map, tile * TILE_COLS, u.token, bar);
  if (lane < ACT_GROUPS) {
    const size_t group = (size_t)tile * ACT_GROUPS + lane;
    bulk_load(to + X_BYTES + p.tiles_per_block * (BASE_BYTES + REST_BYTES) + lane * TOKENS * 8,
              p.meta + (group * p.pitch + u.token) * 8, TOKENS * 8, bar);
  }
#else
  if (lane < 2) {
    tensor_load(to + lane * (X_BYTES / 2), map, tile * TILE_COLS + lane * 64, u.token, bar);
  }
#endif
}

// The first tiles of every stream of the next linear, into the L2.
DEVICE void prefetch_ahead(const Ahead& a, int lane) {
  const int streams = a.num_row_tiles * a.splits;
  for (int i = blockIdx.x + lane * gridDim.x; i < streams; i += gridDim.x * 32) {
    const int first = (long long)a.num_col_tiles * (i % a.splits) / a.splits;
    const size_t tile = (size_t)(i / a.splits) * a.num_col_tiles + first;
    prefetch_l2(a.base + tile * a.base_bytes, a.base_bytes * a.depth);
    if (a.rest_bytes) prefetch_l2(a.rest + tile * a.rest_bytes, a.rest_bytes * a.depth);
  }
}

DEVICE void feed(const Problem& p, const Share& s, const Ring& ring, const TensorMap* map) {
  const int lane = threadIdx.x % 32, total = s.num_units * s.num_tiles;
  const int first = min(total, p.num_stages);
  const u64 policy = evict_first_policy();
  for (int i = 0; i < first; i++) feed_weights(p, s, ring, i, lane, policy);
  wait_for_earlier_kernels();
  for (int i = 0; i < first; i++) feed_x(p, s, ring, map, i, lane);
  for (int i = first; i < total; i++) {
    barrier_wait(ring.empty + i % p.num_stages * 8, (i / p.num_stages - 1) & 1);
    feed_weights(p, s, ring, i, lane, policy);
    feed_x(p, s, ring, map, i, lane);
  }
  if (p.ahead.depth) prefetch_ahead(p.ahead, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    linear(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw[];
  __shared__ u64 barriers[2 * MAX_STAGES + 2];
  launch_dependents();
  const int warp = threadIdx.x / 32, consumers = blockDim.x / 32 - 1;
  const Share s = my_share(p);
  const u32 bars = smem_address(barriers);
  const Ring ring = {(smem_address(raw) + 1023) / 1024 * 1024, stage_bytes(p.tiles_per_block), bars,
                     bars + MAX_STAGES * 8};
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.num_stages; i++) {
      barrier_init(ring.full + i * 8, 1);
      barrier_init(ring.empty + i * 8, consumers);
    }
    barrier_init(bars + 2 * MAX_STAGES * 8, p.splits);
    barrier_init(bars + 2 * MAX_STAGES * 8 + 8, p.splits);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (p.splits > 1) cluster_sync();
  else __syncthreads();

  if (warp == consumers) {
    feed(p, s, ring, &map);
    return;
  }
  const Lane l = my_lane(warp);
  Exchange e = {ring.stages + p.num_stages * ring.bytes, bars + 2 * MAX_STAGES * 8,
                bars + 2 * MAX_STAGES * 8 + 8, 0};
  const int tile = warp * RT / 2;
  for (int unit = 0, i = 0; unit < s.num_units; unit++) {
    const Unit u = unit_of(p, s, unit);
    Accumulators acc;
    clear(acc);
    for (int k = 0; k < s.num_tiles; k++, i++) {
      const int slot = i % p.num_stages;
      const u32 x = ring.stages + slot * ring.bytes, base = x + X_BYTES + tile * BASE_BYTES;
      const u32 rests = x + X_BYTES + p.tiles_per_block * BASE_BYTES;
      const u32 meta = rests + p.tiles_per_block * REST_BYTES;
      barrier_wait(ring.full + slot * 8, i / p.num_stages & 1);
      if (tile < u.tiles_here) multiply_tile(acc, l, x, base, rests + tile * REST_BYTES, meta);
      __syncwarp();
      if (l.lane == 0) barrier_arrive(ring.empty + slot * 8);
    }
    if (unit == 0) wait_for_earlier_kernels();
    finish_unit(p, s, u, acc, l, warp, consumers * 32, e);
  }
  // a block's parts stay until all of its cluster have read them
  if (p.splits > 1 && s.num_units) barrier_wait_cluster(e.free, e.parity ^ 1);
}

#else
// ---- feeding with asynchronous copies by every thread (sm_80, sm_89) -----------------------------

#define RING 3

DEVICE void feed(const Problem& p, const Share& s, u32 stage, int index) {
  const Unit u = unit_of(p, s, index / s.num_tiles);
  const int tile = s.first_tile + index % s.num_tiles;
  const u32 weights = stage + X_BYTES;
  for (int i = threadIdx.x; i < u.tiles_here * (BASE_BYTES / 16); i += blockDim.x) {
    const int r = i / (BASE_BYTES / 16), at = i % (BASE_BYTES / 16) * 16;
    const size_t from = (size_t)(u.row_tile + r) * p.num_col_tiles + tile;
    copy16(weights + r * BASE_BYTES + at, p.base + from * BASE_BYTES + at, true);
  }
#if REST_BYTES
  const u32 rests = weights + p.tiles_per_block * BASE_BYTES;
  for (int i = threadIdx.x; i < u.tiles_here * (REST_BYTES / 16); i += blockDim.x) {
    const int r = i / (REST_BYTES / 16), at = i % (REST_BYTES / 16) * 16;
    const size_t from = (size_t)(u.row_tile + r) * p.num_col_tiles + tile;
    copy16(rests + r * REST_BYTES + at, p.rest + from * REST_BYTES + at, true);
  }
#endif
  // rows of 128 bytes, swizzled; bf16 rows come in two halves of 64 columns
  const int row_bytes = p.num_cols * (ACT == 8 ? 1 : 2), column = tile * (ACT == 8 ? 128 : 256);
  for (int i = threadIdx.x; i < X_BYTES / 16; i += blockDim.x) {
    const int half = i / (TOKENS * 8), row = i / 8 % TOKENS, chunk = i % 8;
    const int from = column + half * 128 + chunk * 16, token = u.token + row;
    const bool is_inside = token < p.num_tokens && from < row_bytes;
    const u8* at = p.x + (is_inside ? (size_t)token * row_bytes + from : 0);
    copy16(stage + half * TOKENS * 128 + row * 128 + ((chunk ^ row % 8) << 4), at, is_inside);
  }
#if META_BYTES
  const u32 metas = weights + p.tiles_per_block * (BASE_BYTES + REST_BYTES);
  for (int i = threadIdx.x; i < META_BYTES / 16; i += blockDim.x) {
    const int group = i / (TOKENS / 2), at = i % (TOKENS / 2) * 16;
    const u8* from = p.meta + ((size_t)(tile * ACT_GROUPS + group) * p.pitch + u.token) * 8 + at;
    copy16(metas + i * 16, from, true);
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    linear(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw[];
  const int warp = threadIdx.x / 32, consumers = blockDim.x / 32;
  const Share s = my_share(p);
  const u32 stages = (smem_address(raw) + 1023) / 1024 * 1024, bytes = stage_bytes(p.tiles_per_block);
  const Lane l = my_lane(warp);
  Exchange e = {stages + RING * bytes, 0, 0, 0};
  const int tile = warp * RT / 2, total = s.num_units * s.num_tiles;
  for (int i = 0; i < RING - 1; i++) {
    if (i < total) feed(p, s, stages + i * bytes, i);
    copy_commit();
  }
  for (int unit = 0, i = 0; unit < s.num_units; unit++) {
    const Unit u = unit_of(p, s, unit);
    Accumulators acc;
    clear(acc);
    for (int k = 0; k < s.num_tiles; k++, i++) {
      copy_wait<RING - 2>();
      __syncthreads();
      const int next = i + RING - 1;
      if (next < total) feed(p, s, stages + next % RING * bytes, next);
      copy_commit();
      const u32 x = stages + i % RING * bytes, base = x + X_BYTES + tile * BASE_BYTES;
      const u32 rests = x + X_BYTES + p.tiles_per_block * BASE_BYTES;
      const u32 meta = rests + p.tiles_per_block * REST_BYTES;
      if (tile < u.tiles_here) multiply_tile(acc, l, x, base, rests + tile * REST_BYTES, meta);
    }
    finish_unit(p, s, u, acc, l, warp, consumers * 32, e);
  }
}
#endif
