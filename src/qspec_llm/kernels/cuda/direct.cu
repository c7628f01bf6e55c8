// out [tokens, rows] = x [tokens, columns] times packed weights, transposed; 8 NT tokens a block.
//
// The columns are cut into 8 ranges. A block owns blocks of RT tiles of 16 rows, one after the other; its
// 8 warps own a range each. A warp loads weights from memory straight into the registers that the tensor
// cores read, DEPTH tiles ahead, and keeps the x of its range in shared memory of its own, in pieces that
// arrive one by one, or lets the pieces pass by where there is no room for all. Warps meet only to add up
// their ranges. Weights do not depend on earlier kernels, so the first LEAD tiles of them are on their way
// before those have ended.
//
// A row of x meets the weights in an order that depends on the matrix alone: the tiles of a range one
// after the other, then the ranges in order. The number of tokens picks only NT.
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   ACT     16: x is bf16, 8: x is int8 codes with meta {scale, sum} per ACT_GROUP columns and token
//   NT      tiles of 8 tokens, 1 or 2
//   RT, DEPTH, LEAD, BLOCKS (a multiprocessor)  change no sum

#include "tile.cuh"

#define RANGES 8
#define TOKENS (NT * 8)
#define ROWS (RT * TILE_ROWS)
#define X_TILE (TILE_COLS * ACT / 8)  // bytes of one token's columns of a tile
#if ACT == 8
#define ACT_GROUPS (TILE_COLS / ACT_GROUP)
#define META_TILE (ACT_GROUPS * TOKENS * 8)
#define SUBGROUP (GROUP < ACT_GROUP ? GROUP : ACT_GROUP)
#else
#define META_TILE 0
#endif
#define MOST_BUFFERS 8
#define SUM_STRIDE (TOKENS + 1)
#define SUM_BYTES (ROWS * SUM_STRIDE * 4)

struct Problem {
  const u8* x;
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  int num_tokens, num_rows, num_cols, num_row_tiles, num_col_tiles;
  int pitch;
  int num_blocks;       // of RT row tiles
  int piece;            // tiles of columns that a buffer of x holds
  int num_buffers;      // of a warp
  int keeps_x;          // there is a buffer for every piece
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

struct Lane {
  int lane, g, t;
  int scales;  // from this lane's 16 bytes of a tile's first plane to its scale
};

DEVICE Lane my_lane() {
  Lane l;
  l.lane = threadIdx.x % 32;
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

// x of one tile of columns in shared memory: this lane's rows for load_matrices, and its scales.
struct Activations {
  u32 row[NT];
  u32 meta;
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
// The scales and shifts of one group for rows g and g + 8.
struct GroupScales {
  float scale[2];
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
// themselves: a scale of 1/16 makes up for it exactly.
#define UPPER 16

// An integer below 2^22 in size that was added to this is the mantissa of a float.
#define MAGIC_BITS 0x4B400000
#define MAGIC 12582912.f

// Integer products of a subgroup of columns, then one float accumulation with both scales.
DEVICE void multiply_tile(Accumulators& acc, const Lane& l, Weights (&w)[RT], const Activations& x,
                          const Stream (&next)[RT], bool has_next) {
  GroupScales scales[RT];
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
    }
    u32 b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) load_matrices(b[n], x.row[n] + h * 64);
#pragma unroll
    for (int sub = 0; sub < 64 / SUBGROUP; sub++) {
      const int column = h * 64 + sub * SUBGROUP;
      const int act_group = column / ACT_GROUP;
      if (column % GROUP == 0) {
#pragma unroll
        for (int r = 0; r < RT; r++) {
          scales[r] = scales_of(l, w[r], column / GROUP);
          scales[r].scale[1] *= 1.f / UPPER;
        }
      }
      float xs[NT][2];
      int sum[NT][2];
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 m = load_shared4(x.meta + (act_group * TOKENS + n * 8) * 8);
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
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const int z0 = -LEVEL_ZERO * sum[n][0], z1 = -LEVEL_ZERO * sum[n][1];
          const int upper0 = -LEVEL_ZERO * UPPER * sum[n][0];
          const int upper1 = -LEVEL_ZERO * UPPER * sum[n][1];
#if BITS == 8
          int high[4] = {0, 0, 0, 0};
          int d[4] = {z0, z1, upper0, upper1};
#pragma unroll
          for (int step = sub * (SUBGROUP / 32); step < (sub + 1) * (SUBGROUP / 32); step++) {
            mma_u8s8(high, a[r][step], b[n][2 * step], b[n][2 * step + 1]);
            mma_u8s8(d, fine[r][step], b[n][2 * step], b[n][2 * step + 1]);
          }
          float product[4];
#pragma unroll
          for (int i = 0; i < 4; i++) product[i] = (float)(d[i] + 16 * high[i]);
#else
          int d[4] = {MAGIC_BITS + z0, MAGIC_BITS + z1, MAGIC_BITS + upper0, MAGIC_BITS + upper1};
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
            acc[r][n][i] = fmaf(product[i], xs[n][i & 1] * scales[r].scale[i >> 1], acc[r][n][i]);
#if HAS_SHIFT
            acc[r][n][i] = fmaf((float)sum[n][i & 1] * xs[n][i & 1], scales[r].shift[i >> 1],
                                acc[r][n][i]);
#endif
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
        load_matrices(b, x.row[n] + h * 128 + step * 32);
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
          for (int i = 0; i < 4; i++) {
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
        load_matrices(b, x.row[n] + h * 128 + step * 32);
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

// ---- x -------------------------------------------------------------------------------------------

// A warp's buffers of x: rows of `piece` tiles, 16 bytes further apart than they are long so that
// load_matrices meets every bank, then the scales.
struct Window {
  u32 buffers, barriers;  // shared addresses
  u32 row_bytes, bytes;   // from row to row, and of a buffer
  int tokens, first_token, first, count;
  int next;               // first tile of the piece to fetch
  int to_fetch;           // pieces
  int slot, parity;       // of the piece that is read

  // Columns that do not exist are zeros, and tokens that do not exist are not read.
  DEVICE void fetch(const Problem& p, int to, int lane) {
    if (to_fetch == 0) return;
    to_fetch--;
    const u32 buffer = buffers + to * bytes;
    const int tiles = min(p.piece, count - next), tile = first + next;
    const int width = min(tiles * X_TILE, p.num_cols * (ACT / 8) - tile * X_TILE);
    const u8* from = p.x + (size_t)first_token * p.num_cols * (ACT / 8) + tile * X_TILE;
    for (int i = lane; i < tokens * (tiles * X_TILE - width) / 16; i += 32) {
      const int chunks = (tiles * X_TILE - width) / 16;
      zero_shared4(buffer + i / chunks * row_bytes + width + i % chunks * 16);
    }
#if HAS_BULK_COPY
    const u32 barrier = barriers + to * 8;
    if (lane == 0) barrier_expect(barrier, tokens * width + tiles * META_TILE);
    __syncwarp();
    if (lane < tokens) {
      bulk_load(buffer + lane * row_bytes, from + (size_t)lane * p.num_cols * (ACT / 8), width,
                barrier);
    }
#else
    for (int i = lane; i < tokens * (width / 16); i += 32) {
      const int token = i / (width / 16), at = i % (width / 16) * 16;
      copy16(buffer + token * row_bytes + at, from + (size_t)token * p.num_cols * (ACT / 8) + at);
    }
#endif
#if ACT == 8
    const u32 meta = buffer + tokens * row_bytes;
#if HAS_BULK_COPY
    if (p.pitch == TOKENS) {
      if (lane == 0) {
        bulk_load(meta, p.meta + tile * META_TILE, tiles * META_TILE, barrier);
      }
      next = next + tiles == count ? 0 : next + tiles;
      return;
    }
#endif
    for (int i = lane; i < tiles * ACT_GROUPS; i += 32) {
      const u8* row = p.meta + ((size_t)(tile * ACT_GROUPS + i) * p.pitch + first_token) * 8;
#if HAS_BULK_COPY
      bulk_load(meta + i * TOKENS * 8, row, TOKENS * 8, barrier);
#else
#pragma unroll
      for (int k = 0; k < TOKENS / 2; k++) copy16(meta + (i * TOKENS + k * 2) * 8, row + k * 16);
#endif
    }
#endif
#if !HAS_BULK_COPY
    copy_commit();
#endif
    next = next + tiles == count ? 0 : next + tiles;
  }

  DEVICE void wait() {
#if HAS_BULK_COPY
    barrier_wait(barriers + slot * 8, parity);
#else
    copy_wait<0>();
#endif
    __syncwarp();
  }

  // Where this lane reads the first tile of the piece.
  DEVICE Activations look(const Lane& l) const {
    Activations x;
    const u32 buffer = buffers + slot * bytes;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const int token = min(n * 8 + l.lane % 8, tokens - 1);
      x.row[n] = buffer + token * row_bytes + l.lane / 8 * 16;
    }
    x.meta = buffer + tokens * row_bytes + 2 * l.t * 8;
    return x;
  }
};

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
    for (int range = 1; range < RANGES; range++) sum += load_shared(at + range * SUM_BYTES);
    sum += bias_of(p, first_row + row);
    const size_t to = (size_t)(first_token + token) * p.num_rows + first_row + row;
    if (p.out_is_float) ((float*)p.out)[to] = sum;
    else ((u16*)p.out)[to] = float_to_bf16(sum);
  }
}

extern "C" __global__ void __launch_bounds__(RANGES * 32, BLOCKS)
    direct(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) u8 shared[];
  launch_dependents();
  const Lane l = my_lane();
  const int range = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be the same in all lanes
  const u32 sums = smem_address(shared), barriers = sums + 2 * RANGES * SUM_BYTES;

  Window window;
  window.first = p.num_col_tiles * range / RANGES;
  window.count = p.num_col_tiles * (range + 1) / RANGES - window.first;
  window.first_token = blockIdx.y * TOKENS;
  window.tokens = min(TOKENS, p.num_tokens - window.first_token);
  window.row_bytes = p.piece * X_TILE + 16;
  window.bytes = window.tokens * window.row_bytes + p.piece * META_TILE;
  window.barriers = barriers + range * MOST_BUFFERS * 8;
  window.buffers = barriers + RANGES * MOST_BUFFERS * 8 + range * p.num_buffers * window.bytes;
  window.next = window.slot = window.parity = 0;
  const int count = window.count;
  window.to_fetch = (count + p.piece - 1) / p.piece;
  if (!p.keeps_x) {
    window.to_fetch *= (p.num_blocks - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  }

  // the sequence of tiles: those of the range, for every block of rows
  Stream next[RT];
  int next_block = blockIdx.x, next_left = 0;
  bool has_next = count > 0;
  auto start_block = [&]() {
    has_next = next_block < p.num_blocks;
    if (!has_next) return;
    next_left = count;
#pragma unroll
    for (int r = 0; r < RT; r++) {
      // a row of tiles beyond the matrix computes the last one's again, and stores nothing
      const int row_tile = min(next_block * RT + r, p.num_row_tiles - 1);
      const size_t tile = (size_t)row_tile * p.num_col_tiles + window.first;
      next[r].base = p.base + tile * BASE_BYTES + l.lane * 16;
      next[r].rest = p.rest + tile * REST_BYTES + l.lane * 16;
    }
  };
  auto advance = [&]() {
#pragma unroll
    for (int r = 0; r < RT; r++) next[r].base += BASE_BYTES, next[r].rest += REST_BYTES;
    if (--next_left == 0) {
      next_block += gridDim.x;
      start_block();
    }
  };

  Weights w[DEPTH][RT];
  auto load = [&](int d) {
    if (!has_next) return;
    reload(w[d], next, l, 0, true);
    reload(w[d], next, l, 1, true);
    advance();
  };
  if (count) start_block();
#pragma unroll
  for (int d = 0; d < LEAD; d++) load(d);
#if HAS_BULK_COPY
  if (l.lane < p.num_buffers) barrier_init(window.barriers + l.lane * 8, 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
#endif
  wait_for_earlier_kernels();
  for (int i = 0; i < p.num_buffers; i++) window.fetch(p, i, l.lane);
#pragma unroll
  for (int d = LEAD; d < DEPTH; d++) load(d);

  int block = blockIdx.x, round = 0;
  Accumulators acc = {};
  // Adds up a block of rows; two buffers of sums, so that one barrier a block is enough.
  auto finish = [&]() {
    const u32 to = sums + round * RANGES * SUM_BYTES;
    leave_sums(to + range * SUM_BYTES, acc, l);
    __syncthreads();
    add_ranges(p, to, block * ROWS, window.first_token);
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;
    block += gridDim.x;
    round ^= 1;
  };
  if (count == 0) {
    while (block < p.num_blocks) finish();
    return;
  }
  window.wait();
  Activations x = window.look(l);
  int tile = 0, left = min(p.piece, count);  // tiles of the block that are done, and left of a piece
  while (block < p.num_blocks) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      multiply_tile(acc, l, w[d], x, next, has_next);
      if (has_next) advance();
#pragma unroll
      for (int n = 0; n < NT; n++) x.row[n] += X_TILE;
      x.meta += META_TILE;
      if (--left) continue;
      const bool is_last = block + (int)gridDim.x >= p.num_blocks;
      tile = min(tile + p.piece, count);
      if (!p.keeps_x) {
        __syncwarp();
        window.fetch(p, window.slot, l.lane);
      }
      window.slot++;
      if (tile == count) {
        finish();
        if (is_last) break;
        tile = 0;
        if (p.keeps_x) window.slot = 0;
      }
      if (window.slot == p.num_buffers) window.slot = 0, window.parity ^= p.keeps_x ^ 1;
      window.wait();
      x = window.look(l);
      left = min(p.piece, count - tile);
    }
  }
}
