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

#include "wide_products.cuh"
#include "wide_sums.cuh"

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
  int switch_at;  // at which the next weights are those of another share
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
  Operands a;       // of these
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
        multiply_tile(acc, raw, l, of_x, next, is_there, release, a);
        release = full + MAX_STAGES * 8;
#else
        multiply_tile(acc, raw, l, of_x, next, is_there);
        converged();  // all lanes have read the scales of x
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
