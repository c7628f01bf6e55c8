// What reads packed weights without multiplying: rows of an embedding, and tiles decoded to bf16.
// The weights' form is in tile.cuh; here BITS is that of the verify view.

#define EVERY_SIGN
#include "decode.cuh"

// The weight of one row and column of a tile, at full precision.
DEVICE float weight_at(const u8* base, const u8* rest, int row, int column) {
  const int upper = row / 8, g = row % 8;
  const int half = column / 64, step = column / 16 % 4, q = column % 16;
  const int t = q % 8 / 2, b0 = q % 2, b1 = q / 8;
  const int lane = g * 4 + t;
#if BITS == 0
  const u16* values = (const u16*)(base + dense_at(half, step) + lane * 16);
  return bf16_to_float(values[(b1 * 2 + upper) * 2 + b0]);
#else
  const u32 at = nibbles_at(half) + lane * 16 + step * 4 + b0 * 2 + b1;
  const u32 code = base[at] >> (4 * upper) & 15;
  const int group = column / GROUP;
  const u32 scale_bits = *(const u16*)(base + scale_at(group, row, 0));
#if BITS == 16
  const u32 r4 = rest[at] >> (4 * upper) & 15;
  const u32 r8 = rest[bytes_at(half, step / 2) + lane * 16 + (step % 2 * 2 + upper) * 4 +
                      b1 * 2 + b0];
  const u32 r = r4 << 8 | r8;
  // (c - 7.5) s is exact in float32: one rounding to bf16
  const u32 anchor = float_to_bf16(((float)code - 7.5f) * bf16_to_float(scale_bits));
  return bf16_to_float((r ? anchor + r - 3583u : anchor & 0x8000u) & 0xFFFFu);
#else
  float scale = scale_to_float(scale_bits);
  int level = (int)(SIGNED ? code - (code >> 3) : code);
#if BITS == 8
  level = level * 16 + (rest[at] >> (4 * upper) & 15);
  scale *= 1.f / 16.f;
#endif
  float w = __fmul_rn((float)(level - LEVEL_ZERO), scale);
#if OFFSET
  w = __fadd_rn(w, scale_to_float(*(const u16*)(base + scale_at(group, row, 1))));
#endif
  return w;
#endif
#endif
}

// out [tokens, columns]: rows of the matrix, one block a token.
extern "C" __global__ void embed(const long long* tokens, const u8* base, const u8* rest, u8* out,
                                 int num_cols, int num_col_tiles, int num_rows, int out_is_float) {
  launch_dependents();
  wait_for_earlier_kernels();
  const long long token = tokens[blockIdx.x];
  // a token out of range reads nothing: the caller checked, or padding is computed and thrown away
  const bool is_inside = token >= 0 && token < num_rows;
  for (int column = threadIdx.x; column < num_cols; column += blockDim.x) {
    float w = 0.f;
    if (is_inside) {
      const size_t tile = (size_t)(token / TILE_ROWS) * num_col_tiles + column / TILE_COLS;
      w = weight_at(base + tile * BASE_BYTES, rest + tile * REST_BYTES, token % TILE_ROWS,
                    column % TILE_COLS);
    }
    const size_t at = (size_t)blockIdx.x * num_cols + column;
    if (out_is_float) ((float*)out)[at] = w;
    else ((u16*)out)[at] = float_to_bf16(w);
  }
}

// out [16 row tiles, 128 column tiles] bf16, row-major: tiles [first, first + gridDim.y) of 16 rows.
// Four warps decode a tile each into shared memory, which makes the writes whole lines.
extern "C" __global__ void __launch_bounds__(128)
    decode(const u8* base, const u8* rest, u8* out, int first, int num_col_tiles) {
  __shared__ __align__(16) u32 words[4][TILE_ROWS][TILE_COLS / 2 + 4];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int col_tile = blockIdx.x * 4 + warp, row_tile = first + blockIdx.y;
  if (col_tile >= num_col_tiles) return;
  const size_t tile = (size_t)row_tile * num_col_tiles + col_tile;
  const u8* from = base + tile * BASE_BYTES;
  const u8* more = rest + tile * REST_BYTES;
  uint4 pieces[2][4];  // all loads are under way before the first is used
#pragma unroll
  for (int h = 0; h < 2; h++) {
#if BITS == 0
#pragma unroll
    for (int i = 0; i < 4; i++) pieces[h][i] = load_once(from + dense_at(h, i) + lane * 16);
#else
    pieces[h][0] = load_once(from + nibbles_at(h) + lane * 16);
    pieces[h][1] = pieces[h][2] = pieces[h][3] = make_uint4(0, 0, 0, 0);
#if BITS != 4
    pieces[h][1] = load_once(more + nibbles_at(h) + lane * 16);
#endif
#if BITS == 16
    pieces[h][2] = load_once(more + bytes_at(h, 0) + lane * 16);
    pieces[h][3] = load_once(more + bytes_at(h, 1) + lane * 16);
#endif
#endif
  }
#if BITS
  Factors factors[GROUPS_PER_TILE];
#pragma unroll
  for (int group = 0; group < GROUPS_PER_TILE; group++) {
    u32 scales[2], offsets[2] = {0, 0};
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      scales[upper] = load_once_u16(from + scale_at(group, g + 8 * upper, 0));
#if OFFSET
      offsets[upper] = load_once_u16(from + scale_at(group, g + 8 * upper, 1));
#endif
    }
    factors[group] = factors_of(scales, offsets);
  }
#endif
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint4 w = pieces[h][0], e = pieces[h][1];
    const u32 codes[4] = {w.x, w.y, w.z, w.w}, r4[4] = {e.x, e.y, e.z, e.w};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      u32 a[4];
#if BITS
      const uint4 f = pieces[h][2 + step / 2];
      const u32 fine[2] = {step % 2 ? f.z : f.x, step % 2 ? f.w : f.y};
      weights_of(a, codes[step], r4[step], fine, factors[(h * 64 + step * 16) / GROUP]);
#else
      const uint4 d = pieces[h][step];
      a[0] = d.x, a[1] = d.y, a[2] = d.z, a[3] = d.w;
#endif
#pragma unroll
      for (int i = 0; i < 4; i++) {
        words[warp][g + 8 * (i & 1)][h * 32 + step * 8 + t + 4 * (i >> 1)] = a[i];
      }
    }
  }
  wait_for_earlier_kernels();
  __syncwarp();
#pragma unroll
  for (int i = lane; i < TILE_ROWS * 16; i += 32) {
    const int row = i / 16, chunk = i % 16;
    const uint4 v = *(const uint4*)&words[warp][row][chunk * 4];
    const size_t line = (size_t)(blockIdx.y * TILE_ROWS + row) * num_col_tiles + col_tile;
    *(uint4*)(out + line * (TILE_COLS * 2) + chunk * 16) = v;
  }
}

// Reads every 16 bytes of a memory once: the fastest that memory can be read.
extern "C" __global__ void __launch_bounds__(256)
    read_all(const uint4* memory, u32* sink, long long count) {
  u32 seen = 0;
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = __ldcs(memory + i + k * step);
#pragma unroll
    for (int k = 0; k < 4; k++) seen |= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += step) seen |= __ldcs(memory + i).x;
  if (seen == 0x13579BDFu) *sink = seen;  // keeps the loads
}
