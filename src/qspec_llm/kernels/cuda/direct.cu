// out [tokens, rows] = x [tokens, columns] times packed weights, transposed; 8 NT tokens a block.
//
// The columns are cut into 8 ranges. A block owns RT tiles of 16 rows; its 8 warps own a range each. A
// warp loads weights from memory straight into the registers that the tensor cores read, DEPTH tiles
// ahead, and copies the x of its own range into a ring of its own, STAGES tiles ahead: warps meet only
// once, to add up their ranges. What hides the latency of memory is the number of warps. Weights do not
// depend on earlier kernels, so the first of them are on their way before those have ended.
//
// A row of x meets the weights in an order that depends on the matrix alone: the tiles of a range one
// after the other, then the ranges in order. The number of tokens picks only NT.
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT     16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT      tiles of 8 tokens, 1 or 2
//   RT, DEPTH, STAGES, BLOCKS (a multiprocessor)  change no sum

#include "tile.cuh"

#define RANGES 8
#define TOKENS (NT * 8)
#define ROWS (RT * TILE_ROWS)
#if ACT == 8
#define X_BYTES (TOKENS * 128)  // of a tile of columns
#define ACT_GROUPS (TILE_COLS / ACT_GROUP)
#define META_BYTES (ACT_GROUPS * TOKENS * 8)
#define SUBGROUP (GROUP < ACT_GROUP ? GROUP : ACT_GROUP)
#else
#define X_BYTES (TOKENS * 256)
#define META_BYTES 0
#endif
#define X_STAGE (X_BYTES + META_BYTES)
#define COPY(to, from, is_inside) \
  (X_CACHED ? copy16_cached(to, from, is_inside) : copy16(to, from, is_inside))
#define SUM_STRIDE (TOKENS + 1)
#define SUM_BYTES ((ROWS * SUM_STRIDE * 4 + 127) / 128 * 128)
#define WARP_BYTES (STAGES * X_STAGE > SUM_BYTES ? STAGES * X_STAGE : SUM_BYTES)

struct Problem {
  const u8* x;
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  const u8* ahead[2];  // what the next linear reads first
  int ahead_bytes[2];
  int num_tokens, num_rows, num_cols, num_row_tiles, num_col_tiles;
  int pitch;
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

struct Lane {
  int lane, g, t;
  u32 matrix_row, matrix_chunk;
};

DEVICE Lane my_lane() {
  Lane l;
  l.lane = threadIdx.x % 32;
  l.g = l.lane / 4, l.t = l.lane % 4;
  l.matrix_row = l.lane % 8, l.matrix_chunk = l.lane / 8;
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

// Where the next tile of one row of tiles lies.
struct Stream {
  const u8* base;
  const u8* rest;
};

DEVICE void load_half(Weights& w, const Stream& s, int lane, int h) {
#if BITS == 0
#pragma unroll
  for (int i = 0; i < 4; i++) w.dense[h][i] = load_once(s.base + dense_at(h, i) + lane * 16);
#else
  w.q4[h] = load_once(s.base + nibbles_at(h) + lane * 16);
#if BITS != 4
  w.r4[h] = load_once(s.rest + nibbles_at(h) + lane * 16);
#endif
#if BITS == 16
  w.r8[h][0] = load_once(s.rest + bytes_at(h, 0) + lane * 16);
  w.r8[h][1] = load_once(s.rest + bytes_at(h, 1) + lane * 16);
#endif
#endif
}

#if BITS != 0
DEVICE u32 load_scale_plane(const u8* base, int lane, int which) {
  const u8* plane = base + scale_at(0, 0, which);
#if GROUP == 32
  return load_once_u32(plane + lane * 4);
#else
  return load_once_u16(plane + (GROUP == 64 ? lane : lane % 16) * 2);
#endif
}
#endif

DEVICE void load_scales(Weights& w, const Stream& s, int lane) {
#if BITS != 0
  w.scales = load_scale_plane(s.base, lane, 0);
#if OFFSET
  w.offsets = load_scale_plane(s.base, lane, 1);
#endif
#endif
}

#if BITS != 0
// The scale, or offset, of this lane's row g or g + 8, out of the lane that holds it.
DEVICE u32 spread(const Lane& l, u32 plane, int upper, int group) {
#if GROUP == 32
  const u32 pair = __shfl_sync(~0u, plane, group * 8 + upper * 4 + l.g / 2);
  return l.g & 1 ? pair >> 16 : pair & 0xFFFFu;
#else
  return __shfl_sync(~0u, plane, group * 16 + upper * 8 + l.g);
#endif
}
#endif

#if LEVELS
// What one tile's scales are, while those of a later one are on their way.
struct Scales {
  u32 scales, offsets;

  DEVICE float scale(const Lane& l, int upper, int group) const {
    const float unit = BITS == 8 ? 1.f / 16.f : 1.f;
    return scale_to_float(spread(l, scales, upper, group)) * unit;
  }

  // Offset of the weights of a group in units of the weight: b, and the middle of 16 codes.
  DEVICE float shift(const Lane& l, int upper, int group) const {
    float shift = 0.f;
#if OFFSET
    shift = scale_to_float(spread(l, offsets, upper, group));
#endif
#if MIDDLE
    shift += scale_to_float(spread(l, scales, upper, group)) * (7.5f / 16.f);
#endif
    return shift;
  }
};
#endif

// ---- multiplication ------------------------------------------------------------------------------

typedef float Accumulators[RT][NT][4];

// Address of this lane's row for load_matrices: token tile n, 16-byte chunks from `chunk`. Rows of
// 128 bytes are swizzled: chunk i of row r lies at i ^ (r % 8).
DEVICE u32 x_at(const Lane& l, u32 x, int n, int chunk) {
  return x + n * 1024 + l.matrix_row * 128 + (((chunk + l.matrix_chunk) ^ l.matrix_row) << 4);
}

// Multiplies a tile and, as soon as they are used up, loads the weights of the tile at `next`.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], u32 x,
                          const Stream (&next)[RT], bool has_next);

#if LEVELS
DEVICE void take_scales(Scales (&s)[RT], const Lane& l, Weights (&w)[RT], const Stream (&next)[RT],
                        bool has_next) {
#pragma unroll
  for (int r = 0; r < RT; r++) {
    s[r].scales = w[r].scales;
#if OFFSET
    s[r].offsets = w[r].offsets;
#endif
    if (has_next) load_scales(w[r], next[r], l.lane);
  }
}
#endif

#if ACT == 8
// Codes of the upper rows lie in the high nibbles and are multiplied where they are, as 16 times
// themselves: a scale of 1/16 makes up for it exactly.
#define UPPER 16

// An integer below 2^22 in size that was added to this is the mantissa of a float.
#define MAGIC_BITS 0x4B400000
#define MAGIC 12582912.f

// Integer products of a subgroup of columns, then one float accumulation with both scales.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], u32 x,
                          const Stream (&next)[RT], bool has_next) {
  Scales scales[RT];
  take_scales(scales, l, w, next, has_next);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][2][4];  // u, or its high part
#if BITS == 8
    u32 fine[RT][2][4];
#endif
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const uint4 q4 = w[r].q4[h];
      bytes_of(a[r][0], to_unsigned(q4.x), to_unsigned(q4.y), 0);
      bytes_of(a[r][1], to_unsigned(q4.z), to_unsigned(q4.w), 0);
#if BITS == 8
      const uint4 r4 = w[r].r4[h];
      bytes_of(fine[r][0], r4.x, r4.y, 0);
      bytes_of(fine[r][1], r4.z, r4.w, 0);
#endif
      if (has_next) load_half(w[r], next[r], l.lane, h);
    }
    u32 b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) load_matrices(b[n], x_at(l, x, n, h * 4));
#pragma unroll
    for (int sub = 0; sub < 64 / SUBGROUP; sub++) {
      const int column = h * 64 + sub * SUBGROUP;
      const int group = column / GROUP, act_group = column / ACT_GROUP;
      float xs[NT][2];
      int sum[NT][2];
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 m = load_shared4(x + X_BYTES + (act_group * TOKENS + n * 8 + 2 * l.t) * 8);
        xs[n][0] = __uint_as_float(m.x), xs[n][1] = __uint_as_float(m.z);
        sum[n][0] = (int)m.y, sum[n][1] = (int)m.w;
#if GROUP < ACT_GROUP
        // sums of the columns that share the weight's scale: a row of ones times x
        int ones[4] = {0, 0, 0, 0};
        const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
        mma_u8s8(ones, one, b[n][2 * sub], b[n][2 * sub + 1]);
        sum[n][0] = ones[0], sum[n][1] = ones[1];
#endif
      }
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const float scale[2] = {scales[r].scale(l, 0, group),
                                scales[r].scale(l, 1, group) * (1.f / UPPER)};
#if HAS_SHIFT
        const float shift[2] = {scales[r].shift(l, 0, group), scales[r].shift(l, 1, group)};
#endif
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const int z0 = -LEVEL_ZERO * sum[n][0], z1 = -LEVEL_ZERO * sum[n][1];
#if BITS == 8
          int high[4] = {0, 0, 0, 0};
          int d[4] = {z0, z1, z0 * UPPER, z1 * UPPER};
#pragma unroll
          for (int step = sub * (SUBGROUP / 32); step < (sub + 1) * (SUBGROUP / 32); step++) {
            mma_u8s8(high, a[r][step], b[n][2 * step], b[n][2 * step + 1]);
            mma_u8s8(d, fine[r][step], b[n][2 * step], b[n][2 * step + 1]);
          }
          float product[4];
#pragma unroll
          for (int i = 0; i < 4; i++) product[i] = (float)(d[i] + 16 * high[i]);
#else
          int d[4] = {MAGIC_BITS + z0, MAGIC_BITS + z1, MAGIC_BITS + z0 * UPPER,
                      MAGIC_BITS + z1 * UPPER};
#pragma unroll
          for (int step = sub * (SUBGROUP / 32); step < (sub + 1) * (SUBGROUP / 32); step++) {
            mma_u8s8(d, a[r][step], b[n][2 * step], b[n][2 * step + 1]);
          }
          float product[4];
#pragma unroll
          for (int i = 0; i < 4; i++) product[i] = __int_as_float(d[i]) - MAGIC;
#endif
#pragma unroll
          for (int i = 0; i < 4; i++) {
            acc[r][n][i] = fmaf(product[i], xs[n][i & 1] * scale[i >> 1], acc[r][n][i]);
#if HAS_SHIFT
            acc[r][n][i] =
                fmaf((float)sum[n][i & 1] * xs[n][i & 1], shift[i >> 1], acc[r][n][i]);
#endif
          }
        }
      }
    }
  }
}
#elif LEVELS
// Products of bf16 x with levels, a group of columns at a time, then its scale.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], u32 x,
                          const Stream (&next)[RT], bool has_next) {
  Scales scales[RT];
  take_scales(scales, l, w, next, has_next);
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
      if (has_next) load_half(w[r], next[r], l.lane, h);
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      const int column = h * 64 + step * 16, group = column / GROUP;
      const bool is_first = column % GROUP == 0, is_last = (column + 32) % GROUP == 0;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x_at(l, x + h * (X_BYTES / 2), n, step * 2));
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
        const float scale[2] = {scales[r].scale(l, 0, group), scales[r].scale(l, 1, group)};
#if HAS_SHIFT
        const float shift[2] = {scales[r].shift(l, 0, group), scales[r].shift(l, 1, group)};
#endif
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            acc[r][n][i] = fmaf(d[r][n][i], scale[i >> 1], acc[r][n][i]);
#if HAS_SHIFT
            acc[r][n][i] = fmaf(sums[n][i & 1], shift[i >> 1], acc[r][n][i]);
#endif
          }
        }
      }
    }
  }
}
#else
// The bf16 weights of half a tile as A fragments: put together from their planes, or dense ones.
DEVICE void weights_of(u32 (&a)[4][4], const Lane& l, const Weights& w, u32 scales, int h) {
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
        anchor_factors(scale[upper], half[upper], spread(l, scales, upper, group));
      }
    }
    exact_of(a[step], codes[step], r4[step], r8[step], scale, half);
  }
#endif
}

DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], u32 x,
                          const Stream (&next)[RT], bool has_next) {
  u32 scales[RT];
#pragma unroll
  for (int r = 0; r < RT; r++) {
#if BITS == 0
    scales[r] = 0;
#else
    scales[r] = w[r].scales;
    if (has_next) load_scales(w[r], next[r], l.lane);
#endif
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[RT][4][4];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      weights_of(a[r], l, w[r], scales[r], h);
      if (has_next) load_half(w[r], next[r], l.lane, h);
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x_at(l, x + h * (X_BYTES / 2), n, step * 2));
#pragma unroll
        for (int r = 0; r < RT; r++) mma_bf16(acc[r][n], a[r][step], b[0], b[1]);
#pragma unroll
        for (int r = 0; r < RT; r++) mma_bf16(acc[r][n], a[r][step + 1], b[2], b[3]);
      }
    }
  }
}
#endif

// ---- x -------------------------------------------------------------------------------------------

// Copies a tile of x [tokens][columns] into a stage: rows of 128 bytes, those of bf16 in two halves.
// Rows that do not exist keep what was there, since a token's sums see nothing of other tokens;
// columns that do not exist are zeros.
DEVICE void fetch_x(const Problem& p, u32 stage, int tile, int first_token, int lane) {
  const int row_bytes = p.num_cols * (ACT == 8 ? 1 : 2);
  const int first_row = lane / 8, chunk = lane % 8;
  const u8* from = p.x + (size_t)(first_token + first_row) * row_bytes + chunk * 16;
  const int tokens_left = p.num_tokens - first_token;
#pragma unroll
  for (int h = 0; h < (ACT == 8 ? 1 : 2); h++) {
    const int column = tile * (ACT == 8 ? 128 : 256) + h * 128;
#pragma unroll
    for (int k = 0; k < NT * 2; k++) {
      const int row = first_row + 4 * k;
      const u32 to = stage + h * TOKENS * 128 + row * 128 + ((chunk ^ row % 8) << 4);
      const bool is_inside = column + chunk * 16 < row_bytes;
      if (row < tokens_left) {
        COPY(to, is_inside ? from + (size_t)(4 * k) * row_bytes + column : p.x, is_inside);
      }
    }
  }
#if ACT == 8
#pragma unroll
  for (int i = lane; i < ACT_GROUPS * TOKENS / 2; i += 32) {
    const int group = i / (TOKENS / 2), pair = i % (TOKENS / 2);
    const u8* meta = p.meta + ((size_t)(tile * ACT_GROUPS + group) * p.pitch + first_token) * 8;
    COPY(stage + X_BYTES + i * 16, meta + pair * 16, true);
  }
#endif
}

// ---- results -------------------------------------------------------------------------------------

DEVICE float bias_of(const Problem& p, int row) {
  if (p.bias_kind == 0) return 0.f;
  if (p.bias_kind == 1) return bf16_to_float(((const u16*)p.bias)[row]);
  return ((const float*)p.bias)[row];
}

// The sums of this warp's range, in its own shared memory: [row][SUM_STRIDE] float32.
DEVICE void leave_sums(u32 to, const Accumulators& acc, const Lane& l) {
#pragma unroll
  for (int r = 0; r < RT; r++) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = r * TILE_ROWS + l.g + 8 * (i >> 1), token = n * 8 + 2 * l.t + (i & 1);
        store_shared(to + (row * SUM_STRIDE + token) * 4, acc[r][n][i]);
      }
    }
  }
}

// The ranges in order, then the bias; neighbouring threads write neighbouring rows of one token.
DEVICE void add_ranges(const Problem& p, u32 sums, int first_row, int first_token) {
  const int tokens = min(TOKENS, p.num_tokens - first_token);
  for (int item = threadIdx.x; item < ROWS * tokens; item += RANGES * 32) {
    const int token = item / ROWS, row = item % ROWS;
    if (first_row + row >= p.num_rows) continue;
    const u32 at = sums + (row * SUM_STRIDE + token) * 4;
    float sum = load_shared(at);
#pragma unroll
    for (int range = 1; range < RANGES; range++) sum += load_shared(at + range * WARP_BYTES);
    sum += bias_of(p, first_row + row);
    const size_t to = (size_t)(first_token + token) * p.num_rows + first_row + row;
    if (p.out_is_float) ((float*)p.out)[to] = sum;
    else ((u16*)p.out)[to] = float_to_bf16(sum);
  }
}

// The last blocks fetch what the next linear reads first into the L2, a part each.
DEVICE void fetch_ahead(const Problem& p) {
  const int blocks = min((int)gridDim.x, 256), block = (int)blockIdx.x - ((int)gridDim.x - blocks);
  if (block < 0 || blockIdx.y) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    for (int at = (block * RANGES * 32 + threadIdx.x) * 128; at < p.ahead_bytes[i];
         at += blocks * RANGES * 32 * 128) {
      prefetch_l2(p.ahead[i] + at);
    }
  }
}

extern "C" __global__ void __launch_bounds__(RANGES * 32, BLOCKS)
    direct(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) u8 shared[];
  launch_dependents();
  const int range = threadIdx.x / 32, first_token = blockIdx.y * TOKENS;
  const Lane l = my_lane();
  const int first = p.num_col_tiles * range / RANGES;
  const int count = p.num_col_tiles * (range + 1) / RANGES - first;
  const u32 ring = smem_address(shared) + range * WARP_BYTES;

  Stream next[RT];
#pragma unroll
  for (int r = 0; r < RT; r++) {
    // a row of tiles beyond the matrix computes the last one's again, and stores nothing
    const int row_tile = min((int)blockIdx.x * RT + r, p.num_row_tiles - 1);
    const size_t tile = (size_t)row_tile * p.num_col_tiles + first;
    next[r].base = p.base + tile * BASE_BYTES;
    next[r].rest = p.rest + tile * REST_BYTES;
  }
  Weights w[DEPTH][RT];
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    if (d >= count) break;
#pragma unroll
    for (int r = 0; r < RT; r++) {
      load_scales(w[d][r], next[r], l.lane);
      load_half(w[d][r], next[r], l.lane, 0);
      load_half(w[d][r], next[r], l.lane, 1);
      next[r].base += BASE_BYTES, next[r].rest += REST_BYTES;
    }
  }
  wait_for_earlier_kernels();
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (i < count) fetch_x(p, ring + i * X_STAGE, first + i, first_token, l.lane);
    copy_commit();
  }

  Accumulators acc = {};
  u32 stage = ring;
  for (int start = 0; start < count; start += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int i = start + d;
      if (i >= count) break;
      copy_wait<STAGES - 1>();
      __syncwarp();
      multiply_tile(acc, l, w[d], stage, next, i + DEPTH < count);
#pragma unroll
      for (int r = 0; r < RT; r++) next[r].base += BASE_BYTES, next[r].rest += REST_BYTES;
      __syncwarp();
      if (i + STAGES < count) fetch_x(p, stage, first + i + STAGES, first_token, l.lane);
      copy_commit();
      stage = stage + X_STAGE == ring + STAGES * X_STAGE ? ring : stage + X_STAGE;
    }
  }
  __syncwarp();
  leave_sums(ring, acc, l);
  __syncthreads();
  add_ranges(p, smem_address(shared), blockIdx.x * ROWS, first_token);
  fetch_ahead(p);
}
