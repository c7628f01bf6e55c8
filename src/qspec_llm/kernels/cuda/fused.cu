// out [tokens, rows] = x [tokens, columns] times packed weights, transposed, for prompts (Hopper).
//
// A thread block multiplies 128 rows of weights with NT * 8 tokens over one range of the columns. One
// warp copies tiles of weights as they lie in memory, another x in pieces of 64 columns, into rings in
// shared memory; two warpgroups decode 64 rows each to bf16 and hand them to warpgroup products as
// operand A. Each works on the next columns while its products are under way, and the tensor cores have
// products of one or the other.
//
// Thread blocks form clusters of two. Where the columns are one range, they have other rows and the same
// tokens, and fetch half of x each, for both. Where there are two ranges, each has one, and they send
// each other half of their sums.
//
// The order of a sum depends on the matrix alone: a range is summed from 0 in the order of its columns;
// the sums of two ranges are added, which gives the same bits either way round.
//
// Further compile-time parameters (the weights' form is in tile.cuh):
//   NT      tiles of 8 tokens: 8, 16, 24 or 32; changes no sum
//   RANGES  of columns, 1 or 2

#include "decode.cuh"
#include "wgmma.cuh"

#define TOKENS (NT * 8)
#define WARPS 8
#define CONSUMERS (WARPS * 32)
#define X_BYTES (TOKENS * 128)  // 64 columns of all tokens
#define BASE_PLACE 0            // of 8 tiles in a slot of weights
#define REST_PLACE (WARPS * BASE_BYTES)
#define WEIGHT_BYTES (WARPS * (BASE_BYTES + REST_BYTES))
#define MAX_SLOTS 8
#define CLUSTER 2
#define SHARERS (CLUSTER / RANGES)        // of x
#define OUT_WARPS (WARPS / RANGES)        // that store results
#define OUT_PITCH (OUT_WARPS * 32 + 16)   // bytes of a token's results, past bank conflicts
#define OUT_TOKENS 64                     // stored at a time

#if BITS == 0 || BITS == 16
#define PIECES 4  // of 16 bytes, a lane and half tile
#else
#define PIECES (BITS / 4)
#endif

struct Problem {
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  int num_tokens, num_rows, num_row_tiles, num_col_tiles;
  int num_token_blocks, num_units;
  int num_x, num_w;  // slots of the rings
  int bias_kind;     // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

typedef float Accumulators[NT][4];

// A box for both thread blocks of the cluster, at the same place in each, counted by each.
DEVICE void tensor_load_to_all(u32 to, const TensorMap* map, int x, int y, u32 bar) {
#if SHARERS == 1
  tensor_load(to, map, x, y, bar);
#else
  tensor_load_multicast(to, map, x, y, bar, 3);
#endif
}

// All threads of both thread blocks: what either wrote before is visible after.
DEVICE void meet_cluster() {
  cluster_arrive_release();
  cluster_wait();
}

// The warps that store a block's results.
DEVICE void meet_storing() { meet_at<OUT_WARPS * 32>(1); }

// ---- rings ---------------------------------------------------------------------------------------

struct Slot {
  int index, parity;
  DEVICE void advance(int count) {
    if (++index == count) index = 0, parity ^= 1;
  }
};

// Shared addresses: the rings, and barriers of their slots.
struct Rings {
  u32 x, w, out, x_full, x_empty, w_full, w_empty;
};

// What a cluster computes at a time; it takes every so many units, one only where there are two ranges.
struct Work {
  int rank, row_tile, token, first, stop;  // in the cluster; the tiles of columns

  DEVICE Work(const Problem& p, int unit) {
    rank = blockIdx.x % CLUSTER;
    const int range = RANGES == 1 ? 0 : rank;
    const int block = unit / p.num_token_blocks * SHARERS + (SHARERS == 1 ? 0 : rank);
    row_tile = block * WARPS;
    token = unit % p.num_token_blocks * TOKENS;
    first = p.num_col_tiles * range / RANGES;
    stop = p.num_col_tiles * (range + 1) / RANGES;
  }
};

DEVICE int first_unit() { return blockIdx.x / CLUSTER; }
DEVICE int next_unit(int unit) { return unit + gridDim.x / CLUSTER; }

// The weights of a tile of columns: a lane copies the base or the rest of one of the 8 tiles.
DEVICE void fetch_weights(const Problem& p, const Rings& r, const Work& work, const Slot& slot,
                          int column, int lane) {
  const int count = min(max(p.num_row_tiles - work.row_tile, 0), WARPS);
  barrier_wait(r.w_empty + slot.index * 8, slot.parity ^ 1);
  const u32 bar = r.w_full + slot.index * 8, to = r.w + slot.index * WEIGHT_BYTES;
  if (lane == 0) barrier_expect(bar, count * (BASE_BYTES + REST_BYTES));
  __syncwarp();
  const int i = lane % WARPS;
  const size_t tile = (size_t)(work.row_tile + i) * p.num_col_tiles + column;
  if (i < count && lane < WARPS) {
    bulk_load(to + BASE_PLACE + i * BASE_BYTES, p.base + tile * BASE_BYTES, BASE_BYTES, bar);
  }
#if REST_BYTES
  if (i < count && lane / WARPS == 1) {
    bulk_load(to + REST_PLACE + i * REST_BYTES, p.rest + tile * REST_BYTES, REST_BYTES, bar);
  }
#endif
  __syncwarp();
}

DEVICE void feed_weights(const Problem& p, const Rings& r, int lane) {
  Slot slot = {0, 0};
  for (int unit = first_unit(); unit < p.num_units; unit = next_unit(unit)) {
    const Work work(p, unit);
    for (int column = work.first; column < work.stop; column++) {
      fetch_weights(p, r, work, slot, column, lane);
      slot.advance(p.num_w);
    }
  }
}

// x is multiplied in halves of a tile of columns; a thread block fetches its share of the tokens.
DEVICE void feed_x(const Problem& p, const Rings& r, const TensorMap* map, int lane) {
  Slot slot = {0, 0};
  wait_for_earlier_kernels();  // which may write x; nothing writes weights
  for (int unit = first_unit(); unit < p.num_units; unit = next_unit(unit)) {
    const Work work(p, unit);
    const int share = SHARERS == 1 ? 0 : work.rank;
    for (int half = 2 * work.first; half < 2 * work.stop; half++) {
      barrier_wait(r.x_empty + slot.index * 8, slot.parity ^ 1);  // in all that share it
      if (lane == 0) {
        const u32 bar = r.x_full + slot.index * 8;
        barrier_expect(bar, X_BYTES);
        tensor_load_to_all(r.x + slot.index * X_BYTES + share * (X_BYTES / SHARERS), map, half * 64,
                           work.token + share * (TOKENS / SHARERS), bar);
      }
      __syncwarp();
      slot.advance(p.num_x);
    }
  }
}

// ---- multiplication ------------------------------------------------------------------------------

#define HALF_GROUPS (GROUP == 32 ? 2 : 1)

// Half a tile of weights as it lies in memory: a lane's pieces, the scales and offsets of its two rows.
struct Raw {
  uint4 pieces[PIECES];
#if BITS
  u32 scales[HALF_GROUPS][2], offsets[HALF_GROUPS][2];
#endif
};

// Where this lane's bytes of a tile lie in shared memory.
struct Place {
  u32 base, scales, rest;

  DEVICE Place(u32 base_of_tile, u32 rest_of_tile, int lane)
      : base(base_of_tile + lane * 16),
        scales(base_of_tile + lane / 4 * 2),
        rest(rest_of_tile + lane * 16) {}
};

DEVICE void load_half(Raw& raw, const Place& at, int h) {
#if BITS == 0
#pragma unroll
  for (int i = 0; i < 4; i++) raw.pieces[i] = load_shared4(at.base + dense_at(h, i));
#else
  raw.pieces[0] = load_shared4(at.base + nibbles_at(h));
#if BITS != 4
  raw.pieces[1] = load_shared4(at.rest + nibbles_at(h));
#endif
#if BITS == 16
  raw.pieces[2] = load_shared4(at.rest + bytes_at(h, 0));
  raw.pieces[3] = load_shared4(at.rest + bytes_at(h, 1));
#endif
#pragma unroll
  for (int i = 0; i < HALF_GROUPS; i++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      const int group = h * 64 / GROUP + i;
      raw.scales[i][upper] = load_shared_u16(at.scales + scale_at(group, 8 * upper, 0));
      raw.offsets[i][upper] = 0;
      if (OFFSET) raw.offsets[i][upper] = load_shared_u16(at.scales + scale_at(group, 8 * upper, 1));
    }
  }
#endif
}

// 32 of its columns as two steps' operands: the first ones or the last.
DEVICE void decode_pair(u32 (&a)[2][4], const Raw& raw, int pair) {
#if BITS
  const uint4 none = {0, 0, 0, 0}, w = raw.pieces[0];
  const uint4 e = PIECES > 1 ? raw.pieces[PIECES > 1] : none;
  const uint4 f = PIECES > 2 ? raw.pieces[PIECES > 2 ? 2 + pair : 0] : none;
  const u32 codes[2] = {pair ? w.z : w.x, pair ? w.w : w.y};
  const u32 r4[2] = {pair ? e.z : e.x, pair ? e.w : e.y};
  const u32 fine[2][2] = {{f.x, f.y}, {f.z, f.w}};
  const int group = pair * 32 / GROUP;
  const Factors factors = factors_of(raw.scales[group], raw.offsets[group]);
#endif
#pragma unroll
  for (int i = 0; i < 2; i++) {
#if BITS == 0
    const uint4 d = raw.pieces[pair * 2 + i];
    a[i][0] = d.x, a[i][1] = d.y, a[i][2] = d.z, a[i][3] = d.w;
#else
    weights_of(a[i], codes[i], r4[i], fine[i], factors);
#endif
  }
  settle(a[0]), settle(a[1]);
}

// A slot of x is free when this warp's products with it are done.
DEVICE void release_x(u32 empty, int lane) {
#if SHARERS == 1
  if (lane == 0) barrier_arrive(empty);
#else
  if (lane < SHARERS) barrier_arrive_remote(remote_address(empty, lane));
#endif
}

// Where a warp is in the rings.
struct Progress {
  Slot x, w;
};

// The sums of a range, 64 rows a warpgroup.
DEVICE void multiply(Accumulators& acc, Progress& at, const Problem& p, const Rings& r,
                     int num_tiles, int warp, int lane) {
  u32 a[2][2][4];
  int before = 0;  // the slot of x before this one
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
  }
  Raw raw;
  const auto load = [&](int h) {
    const u32 slot = r.w + at.w.index * WEIGHT_BYTES;
    const u32 base = slot + BASE_PLACE + warp * BASE_BYTES;
    const u32 rest = slot + REST_PLACE + warp * REST_BYTES;
    if (h == 0) barrier_wait_whole(r.w_full + at.w.index * 8, at.w.parity);
    load_half(raw, Place(base, rest, lane), h);
  };
  for (int tile = 0; tile < num_tiles; tile++) {
    load(0);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      wgmma_wait<1>();  // the products that read a[pair % 2] are done, and those before
      if (pair % 2 && (pair == 3 || tile > 0)) release_x(r.x_empty + before * 8, lane);
      decode_pair(a[pair % 2], raw, pair % 2);
      if (pair == 1) load(1);  // on its way while these products are issued
      if (pair % 2 == 0) barrier_wait_whole(r.x_full + at.x.index * 8, at.x.parity);
      const u32 b = x_descriptor(r.x + at.x.index * X_BYTES);
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < 2; i++) wgmma_bf16<true>(acc, a[pair % 2][i], b + (pair % 2 * 2 + i) * 2);
      wgmma_commit();
      if (pair % 2) {
        before = at.x.index;
        at.x.advance(p.num_x);
      }
    }
    // products that have been issued have their operands: all of the slot has been read
    __syncwarp();
    if (lane == 0) barrier_arrive(r.w_empty + at.w.index * 8);
    at.w.advance(p.num_w);
  }
  wgmma_wait<0>();
  hold(acc);
  release_x(r.x_empty + before * 8, lane);
}

// ---- results -------------------------------------------------------------------------------------

// The sums of OUT_WARPS warps, from row tile `first_tile` on.
DEVICE void store(Accumulators& acc, const Problem& p, const Work& work, u32 room, int first_tile,
                  int warp, int lane) {
  const int g = lane / 4, t = lane % 4, row = (first_tile + warp) * TILE_ROWS + g;
  if (p.bias_kind) {
    const float bias[2] = {bias_or_zero(p, row), bias_or_zero(p, row + 8)};
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) acc[n][i] += bias[i >> 1];
    }
  }
  if (p.out_is_float || p.num_rows % 8) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = work.token + n * 8 + 2 * t + (i & 1), at_row = row + 8 * (i >> 1);
        if (token >= p.num_tokens || at_row >= p.num_rows) continue;
        const size_t at = (size_t)token * p.num_rows + at_row;
        if (p.out_is_float) ((float*)p.out)[at] = acc[n][i];
        else ((u16*)p.out)[at] = float_to_bf16(acc[n][i]);
      }
    }
    return;
  }
  // through shared memory, so that a token's results are written in one go
  const u32 to = room + (lane / 16 * 8 + lane % 8) * OUT_PITCH + warp * TILE_ROWS * 2 + lane / 8 % 2 * 16;
#pragma unroll
  for (int first = 0; first < NT; first += OUT_TOKENS / 8) {
    meet_storing();  // what was there has been written
#pragma unroll
    for (int n = first; n < first + OUT_TOKENS / 8; n += 2) {
      store_transposed(to + (n - first) * 8 * OUT_PITCH, pack_bf16(acc[n][0], acc[n][1]),
                       pack_bf16(acc[n][2], acc[n][3]), pack_bf16(acc[n + 1][0], acc[n + 1][1]),
                       pack_bf16(acc[n + 1][2], acc[n + 1][3]));
    }
    meet_storing();
    const int chunks = OUT_WARPS * 2;  // of 16 bytes
#pragma unroll
    for (int i = warp * 32 + lane; i < OUT_TOKENS * chunks; i += OUT_WARPS * 32) {
      const int token = work.token + first * 8 + i / chunks;
      const int at_row = first_tile * TILE_ROWS + i % chunks * 8;
      if (token >= p.num_tokens || at_row >= p.num_rows) continue;
      *(uint4*)(p.out + ((size_t)token * p.num_rows + at_row) * 2) =
          load_shared4(room + i / chunks * OUT_PITCH + i % chunks * 16);
    }
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    fused(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ u8 raw_bytes[];
  __shared__ u64 barriers[4 * MAX_SLOTS];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Rings r;
  r.x = (smem_address(raw_bytes) + 1023) / 1024 * 1024;
  r.w = r.x + p.num_x * X_BYTES, r.out = r.w + p.num_w * WEIGHT_BYTES;
  r.x_full = smem_address(barriers), r.x_empty = r.x_full + MAX_SLOTS * 8;
  r.w_full = r.x_empty + MAX_SLOTS * 8, r.w_empty = r.w_full + MAX_SLOTS * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < MAX_SLOTS; i++) {
      barrier_init(r.x_full + i * 8, 1);
      barrier_init(r.x_empty + i * 8, WARPS * SHARERS);
      barrier_init(r.w_full + i * 8, 1);
      barrier_init(r.w_empty + i * 8, WARPS);
    }
    publish_to_copies();
  }
  cluster_arrive();
  cluster_wait();
  if (warp >= WARPS) {
    // a warpgroup that feeds gives its registers to those that multiply
    give_registers<24>();
    if (warp == WARPS) feed_weights(p, r, lane);
    if (warp == WARPS + 1) feed_x(p, r, &map, lane);
    __syncwarp();
    meet_cluster();
    if (RANGES == 2) meet_cluster();
  } else {
    take_registers<240>();
    Accumulators acc;
    Progress at = {};
    for (int unit = first_unit(); unit < p.num_units; unit = next_unit(unit)) {
      const Work work(p, unit);
      multiply(acc, at, p, r, work.stop - work.first, warp, lane);
      wait_for_earlier_kernels();
#if RANGES == 1
      store(acc, p, work, r.out, work.row_tile, warp, lane);
    }
    meet_cluster();  // the other may still write here: x, barriers
#else
      meet_cluster();  // all have read the rings of both, and nobody writes there any more
      // rank 0 stores the rows of its first warpgroup, rank 1 those of its second
      const u32 there = r.x + threadIdx.x % 128 * 16;
      if (warp / 4 != work.rank) {
        const u32 to = remote_address(there, work.rank ^ 1);
#pragma unroll
        for (int n = 0; n < NT; n++) store_remote(to + n * 2048, acc[n]);
      }
      meet_cluster();
      if (warp / 4 != work.rank) return;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 other = load_shared4(there + n * 2048);
        acc[n][0] += __uint_as_float(other.x), acc[n][1] += __uint_as_float(other.y);
        acc[n][2] += __uint_as_float(other.z), acc[n][3] += __uint_as_float(other.w);
      }
      store(acc, p, work, r.out, work.row_tile + work.rank * OUT_WARPS, warp % 4, lane);
    }
#endif
  }
}
