// out [tokens, rows] = x [tokens, columns] times packed weights, transposed; 8 NT tokens a block.
//
// The columns are cut into 8 ranges. A block owns blocks of RT tiles of 16 rows, one after the other; its
// 8 warps own a range each. A warp loads weights from memory straight into the registers that the tensor
// cores read, DEPTH tiles ahead, and keeps the x of its range in shared memory of its own, in pieces that
// arrive one by one, or lets the pieces pass by where there is no room for all. Warps meet only to add up
// their ranges. Weights do not depend on earlier kernels, so the first LEAD tiles of them are on their way
// before those have ended.
//
// In clusters of two, x comes out of the L2 once for both blocks: a warp needs the columns of its like in
// the other block, so each copies every other token, and one of them the scales, into both. Buffers that are
// filled again a block fills alone, since they may still be read in the other.
//
// The number of tokens picks only NT, 1 or 2. Further compile-time parameters (tile.cuh and product.cuh
// have the others): RT, DEPTH, LEAD, BLOCKS (a multiprocessor), CLUSTER change no sum.

#include "product.cuh"

#define MOST_BUFFERS 8

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

// ---- x -------------------------------------------------------------------------------------------

#if HAS_BULK_COPY
// A copy into this block, or into all SHARERS of the cluster: at the same place in each, counted by each.
template <int SHARERS>
DEVICE void load_for(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (SHARERS == 1) bulk_load(to, from, bytes, barrier);
  else bulk_load_multicast(to, from, bytes, barrier, (1 << SHARERS) - 1);
}
#endif

// A warp's buffers of x: rows of `piece` tiles, 16 bytes further apart than they are long so that
// load_matrices meets every bank, then the scales.
struct Window {
  u32 buffers, barriers;  // shared addresses
  u32 row_bytes, bytes;   // from row to row, and of a buffer
  int tokens, first_token, first, count;
  int next;               // first tile of the piece to fetch
  int to_fetch;           // tiles
  int slot, parity;       // of the piece that is read

  // Columns that do not exist are zeros, and tokens that do not exist are not read. Blocks that share the
  // loading all fetch the same piece into the same buffer.
  template <int SHARERS>
  DEVICE void fetch(const Problem& p, int to, int lane) {
    if (to_fetch == 0) return;
    const u32 buffer = buffers + to * bytes, meta = buffer + tokens * row_bytes;
    const int tiles = min(p.piece, count - next), tile = first + next;
    to_fetch -= tiles;
    const int width = min(tiles * X_TILE, p.num_cols * (ACT / 8) - tile * X_TILE);
    const size_t pitch = (size_t)p.num_cols * (ACT / 8);
    const u8* from = p.x + first_token * pitch + tile * X_TILE;
    if (lane < (tiles * X_TILE - width) / 16) {  // less than a tile: no more than the lanes
#pragma unroll 1
      for (int i = 0; i < tokens; i++) zero_shared4(buffer + i * row_bytes + width + lane * 16);
    }
#if HAS_BULK_COPY
    if (is_elected()) {
      const u32 barrier = barriers + to * 8;
      const int rank = blockIdx.x % SHARERS;
      // the bytes of all blocks; some may have arrived before
      barrier_expect(barrier, tokens * width + tiles * META_TILE);
      u32 row = buffer + rank * row_bytes;
      from += rank * pitch;
#pragma unroll 1
      for (int i = rank; i < tokens; i += SHARERS) {
        load_for<SHARERS>(row, from, width, barrier);
        row += SHARERS * row_bytes, from += SHARERS * pitch;
      }
#if ACT == 8
      if (p.pitch != TOKENS) {
        for (int i = rank; i < tiles * ACT_GROUPS; i += SHARERS) {
          const u8* group = p.meta + ((size_t)(tile * ACT_GROUPS + i) * p.pitch + first_token) * 8;
          load_for<SHARERS>(meta + i * TOKENS * 8, group, TOKENS * 8, barrier);
        }
      } else if (rank == SHARERS - 1) {  // which has one token less if their number is odd
        load_for<SHARERS>(meta, p.meta + tile * META_TILE, tiles * META_TILE, barrier);
      }
#endif
    }
#else
    for (int i = lane; i < tokens * (width / 16); i += 32) {
      const int token = i / (width / 16), at = i % (width / 16) * 16;
      copy16(buffer + token * row_bytes + at, from + token * pitch + at);
    }
#if ACT == 8
    for (int i = lane; i < tiles * ACT_GROUPS; i += 32) {
      const u8* row = p.meta + ((size_t)(tile * ACT_GROUPS + i) * p.pitch + first_token) * 8;
#pragma unroll
      for (int k = 0; k < TOKENS / 2; k++) copy16(meta + (i * TOKENS + k * 2) * 8, row + k * 16);
    }
#endif
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
  window.to_fetch = count;
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
#if HAS_BULK_COPY
  // before the loads, which a fence might wait for, and so that the other block's are known in time
  if (l.lane < p.num_buffers) barrier_init(window.barriers + l.lane * 8, 1);
  publish_barriers();
  __syncwarp();
#if CLUSTER > 1
  cluster_arrive();
#endif
#endif
  if (count) start_block();
#pragma unroll
  for (int d = 0; d < LEAD; d++) load(d);
#if CLUSTER > 1
  // The other block runs, and its barriers are known. They need not meet again: a block has rows to compute
  // and ends after it has waited for all that is copied into it.
  cluster_wait();
#endif
  wait_for_earlier_kernels();
  // no more than the pieces of a range, so the same in all blocks
  for (int i = 0; i < p.num_buffers; i++) window.fetch<CLUSTER>(p, i, l.lane);
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
        window.fetch<1>(p, window.slot, l.lane);
      }
      window.slot++;
      if (tile == count) {
        finish();
        if (is_last) break;
        tile = 0;
        if (p.keeps_x) window.slot = 0;
      }
      if (window.slot == p.num_buffers) window.slot = 0, window.parity ^= !p.keeps_x;
      window.wait();
      x = window.look(l);
      left = min(p.piece, count - tile);
    }
  }
}
