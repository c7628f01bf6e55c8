// out [tokens, rows] = x [tokens, columns] times packed weights, transposed, for prompts (Hopper).
//
// A thread block multiplies 128 rows of weights with NT * 8 tokens over one range of the columns. One
// warp copies tiles of weights as they lie in memory, another x in pieces of 64 columns, into rings in
// shared memory; two warpgroups decode 64 rows each to bf16 and hand them to warpgroup products as operand A.
// Each works on the next columns while its products are under way, and the tensor cores always have
// products of one or the other. CLUSTER neighbours with other rows and the same tokens fetch a share of
// x each, for all of them.
//
// The order of a sum depends on the matrix alone: a range is summed from 0 in the order of its columns;
// sums of ranges 2 i and 2 i + 1 are added, then such sums, and so on. An addition of two gives the same
// bits either way round, so whoever comes second adds.
//
// Further compile-time parameters (the weights' form is in tile.cuh), which change no sum:
//   NT  tiles of 8 tokens: 8, 16, 24 or 32      CLUSTER  thread blocks that share x: 1, 2 or 4

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
#define OUT_PITCH (WARPS * TILE_ROWS * 2 + 16)  // bytes of a token's results, past bank conflicts

struct Problem {
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  float4* parts;  // [block of rows and tokens][num_ranges - 1][NT][CONSUMERS]
  u32* meetings;  // [block of rows and tokens][num_ranges - 1][2]: who came, what is there; 0 between launches
  int num_tokens, num_rows, num_row_tiles, num_col_tiles;
  int num_token_blocks, num_ranges;
  int num_x, num_w;  // slots of the rings
  int bias_kind;     // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

typedef float Accumulators[NT][4];

// ---- instructions that only this kernel needs ----------------------------------------------------

#define TILES_24(k, d, n) TILES_16(k, d, n), TILES_8(k, d, n + 16)
#define TILES_32(k, d, n) TILES_16(k, d, n), TILES_16(k, d, n + 16)
#define LIST_96                                                                                    \
  LIST_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,"  \
          "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST_128                                                                                   \
  LIST_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113" \
          ",%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#if NT == 24
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 24, "m64n192k16.f32.bf16.bf16", LIST_96, "%96", "%97", "%98",
             "%99", "%100", ", 1, 1, 0")
DEFINE_HOLD(float, FLOAT, 24)
#elif NT == 32
DEFINE_WGMMA(wgmma_bf16, float, FLOAT, 32, "m64n256k16.f32.bf16.bf16", LIST_128, "%128", "%129",
             "%130", "%131", "%132", ", 1, 1, 0")
DEFINE_HOLD(float, FLOAT, 32)
#endif

// A box for every thread block of the cluster, at the same place in each, counted by each.
DEVICE void tensor_load_to_all(u32 to, const TensorMap* map, int x, int y, u32 bar) {
#if CLUSTER == 1
  tensor_load(to, map, x, y, bar);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(bar), "h"((u16)((1 << CLUSTER) - 1))
      : "memory");
#endif
}

DEVICE u32 rank_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Eight weights' rows x 8 tokens of four matrices, stored token by token; lane l gives the address of
// token l % 8 of matrix l / 8.
DEVICE void store_matrices(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

DEVICE u32 pair_of_floats(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE void load_shared2(u32 (&to)[2], u32 at) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(at));
}

DEVICE void meet_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// ---- rings ---------------------------------------------------------------------------------------

struct Slot {
  int index, parity;
  DEVICE void advance(int count) {
    if (++index == count) index = 0, parity ^= 1;
  }
};

// Shared addresses: the rings, and barriers of their slots.
struct Rings {
  u32 x, w, x_full, x_empty, w_full, w_empty;
};

// What a thread block computes: every CLUSTER of them share all but the rows.
struct Work {
  int row_tile, token, range, place, first, stop;  // the tiles of columns

  DEVICE Work(const Problem& p) {
    const int group = blockIdx.x / CLUSTER, of_rows = group / p.num_ranges;
    range = group % p.num_ranges;
    const int block = of_rows / p.num_token_blocks * CLUSTER + blockIdx.x % CLUSTER;
    row_tile = block * WARPS;
    token = of_rows % p.num_token_blocks * TOKENS;
    place = block * p.num_token_blocks + of_rows % p.num_token_blocks;
    first = p.num_col_tiles * range / p.num_ranges;
    stop = p.num_col_tiles * (range + 1) / p.num_ranges;
  }
};

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

DEVICE void feed_weights(const Problem& p, const Rings& r, const Work& work, int lane) {
  Slot slot = {0, 0};
  for (int column = work.first; column < work.stop; column++) {
    fetch_weights(p, r, work, slot, column, lane);
    slot.advance(p.num_w);
  }
}

// x is multiplied in halves of a tile of columns; this thread block fetches its share of the tokens.
DEVICE void feed_x(const Problem& p, const Rings& r, const Work& work, const TensorMap* map, int lane) {
  const u32 rank = CLUSTER == 1 ? 0 : rank_in_cluster();
  const u32 share = rank * (X_BYTES / CLUSTER);
  Slot slot = {0, 0};
  wait_for_earlier_kernels();  // which may write x; nothing writes weights
  for (int half = 2 * work.first; half < 2 * work.stop; half++) {
    barrier_wait(r.x_empty + slot.index * 8, slot.parity ^ 1);  // in all of the cluster
    if (lane == 0) {
      const u32 bar = r.x_full + slot.index * 8;
      barrier_expect(bar, X_BYTES);
      tensor_load_to_all(r.x + slot.index * X_BYTES + share, map, half * 64,
                         work.token + rank * (TOKENS / CLUSTER), bar);
    }
    __syncwarp();
    slot.advance(p.num_x);
  }
}

// ---- multiplication ------------------------------------------------------------------------------

#if BITS
// Factors of a group, out of a tile's base in shared memory.
DEVICE Factors load_factors(u32 base, int group, int g) {
  u32 scales[2], offsets[2] = {0, 0};
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    scales[upper] = load_shared_u16(base + scale_at(group, g + 8 * upper, 0));
#if OFFSET
    offsets[upper] = load_shared_u16(base + scale_at(group, g + 8 * upper, 1));
#endif
  }
  return factors_of(scales, offsets);
}
#endif

// 32 columns of weights, as two steps' operands.
DEVICE void decode_pair(u32 (&a)[2][4], u32 base, u32 rest, int lane, int pair) {
  const int h = pair / 2;
#if BITS == 0
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 d = load_shared4(base + dense_at(h, pair % 2 * 2 + i) + lane * 16);
    a[i][0] = d.x, a[i][1] = d.y, a[i][2] = d.z, a[i][3] = d.w;
  }
#else
  // this pair's half of each lane's 16 bytes
  u32 codes[2], r4[2] = {0, 0}, fine[2][2] = {{0, 0}, {0, 0}};
  load_shared2(codes, base + nibbles_at(h) + lane * 16 + pair % 2 * 8);
#if BITS != 4
  load_shared2(r4, rest + nibbles_at(h) + lane * 16 + pair % 2 * 8);
#endif
#if BITS == 16
  const uint4 f = load_shared4(rest + bytes_at(h, pair % 2) + lane * 16);
  fine[0][0] = f.x, fine[0][1] = f.y, fine[1][0] = f.z, fine[1][1] = f.w;
#endif
  const Factors factors = load_factors(base, pair * 32 / GROUP, lane / 4);
#pragma unroll
  for (int i = 0; i < 2; i++) weights_of(a[i], codes[i], r4[i], fine[i], factors);
#endif
  settle(a[0]), settle(a[1]);
}

// The sums of a range, 64 rows a warpgroup.
DEVICE void multiply(Accumulators& acc, const Problem& p, const Rings& r, int num_tiles, int warp,
                     int lane) {
  Slot x = {0, 0}, w = {0, 0};
  const u32 empty_of = remote_address(r.x_empty, lane % CLUSTER);
  u32 a[2][2][4];
  int before = 0;  // the slot of x that products under way read
  for (int tile = 0; tile < num_tiles; tile++) {
    const u32 base = r.w + w.index * WEIGHT_BYTES + BASE_PLACE + warp * BASE_BYTES;
    const u32 rest = r.w + w.index * WEIGHT_BYTES + REST_PLACE + warp * REST_BYTES;
    barrier_wait_whole(r.w_full + w.index * 8, w.parity);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      wgmma_wait<1>();  // the products that read a[pair % 2] are done, and those before
      if (pair % 2 && (pair == 3 || tile > 0) && lane < CLUSTER) {
        barrier_arrive_remote(empty_of + before * 8);
      }
      decode_pair(a[pair % 2], base, rest, lane, pair);
      if (pair % 2 == 0) barrier_wait_whole(r.x_full + x.index * 8, x.parity);
      if (pair == 3) {
        __syncwarp();
        if (lane == 0) barrier_arrive(r.w_empty + w.index * 8);
      }
      const u32 b = x_descriptor(r.x + x.index * X_BYTES);
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < 2; i++) {
        wgmma_bf16<true>(acc, a[pair % 2][i], b + (pair % 2 * 2 + i) * 2);
      }
      wgmma_commit();
      if (pair % 2) {
        before = x.index;
        x.advance(p.num_x);
      }
    }
    w.advance(p.num_w);
  }
  wgmma_wait<0>();
  hold(acc);
}

// ---- results -------------------------------------------------------------------------------------

// Adds the sums of other ranges. False: another thread block has more to add and stores the result.
DEVICE bool add_ranges(Accumulators& acc, const Problem& p, const Work& work) {
  __shared__ u32 came_first;
  for (int step = 1; step < p.num_ranges; step *= 2) {
    // where ranges i to i + step - 1 and i + step to i + 2 step - 1 meet
    const int among = work.range / (2 * step) * 2 * step + step - 1;
    const size_t at = (size_t)work.place * (p.num_ranges - 1) + among;
    u32* meeting = p.meetings + at * 2;
    float4* part = p.parts + at * (NT * CONSUMERS) + threadIdx.x;
    if (threadIdx.x == 0) came_first = atomicAdd(meeting, 1) == 0;
    meet_consumers();
    if (came_first) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        __stcg(part + n * CONSUMERS, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
      }
      __threadfence();
      meet_consumers();
      if (threadIdx.x == 0) {
        asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(meeting + 1) : "memory");
      }
      return false;
    }
    if (threadIdx.x == 0) {
      u32 is_there;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(is_there) : "l"(meeting + 1) : "memory");
      } while (!is_there);
      meeting[0] = meeting[1] = 0;
    }
    meet_consumers();
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const float4 other = __ldcg(part + n * CONSUMERS);
      acc[n][0] += other.x, acc[n][1] += other.y, acc[n][2] += other.z, acc[n][3] += other.w;
    }
    meet_consumers();  // before came_first changes
  }
  return true;
}

DEVICE float bias_of(const Problem& p, int row) {
  if (p.bias_kind == 0 || row >= p.num_rows) return 0.f;
  if (p.bias_kind == 1) return bf16_to_float(((const u16*)p.bias)[row]);
  return ((const float*)p.bias)[row];
}

DEVICE void store(Accumulators& acc, const Problem& p, const Work& work, u32 room, int warp,
                  int lane) {
  const int g = lane / 4, t = lane % 4, row = (work.row_tile + warp) * TILE_ROWS + g;
  if (p.bias_kind) {
    const float bias[2] = {bias_of(p, row), bias_of(p, row + 8)};
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
  // through shared memory, so that a token's 128 results are written in one go
  const u32 to = room + (lane / 16 * 8 + lane % 8) * OUT_PITCH + warp * TILE_ROWS * 2 + lane / 8 % 2 * 16;
  meet_consumers();  // all have read the rings
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    store_matrices(to + n * 8 * OUT_PITCH, pair_of_floats(acc[n][0], acc[n][1]),
                   pair_of_floats(acc[n][2], acc[n][3]), pair_of_floats(acc[n + 1][0], acc[n + 1][1]),
                   pair_of_floats(acc[n + 1][2], acc[n + 1][3]));
  }
  meet_consumers();
  for (int i = threadIdx.x; i < TOKENS * 16; i += CONSUMERS) {
    const int token = work.token + i / 16, at_row = work.row_tile * TILE_ROWS + i % 16 * 8;
    if (token >= p.num_tokens || at_row >= p.num_rows) continue;
    *(uint4*)(p.out + ((size_t)token * p.num_rows + at_row) * 2) =
        load_shared4(room + i / 16 * OUT_PITCH + i % 16 * 16);
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
  r.w = r.x + p.num_x * X_BYTES;
  r.x_full = smem_address(barriers), r.x_empty = r.x_full + MAX_SLOTS * 8;
  r.w_full = r.x_empty + MAX_SLOTS * 8, r.w_empty = r.w_full + MAX_SLOTS * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < MAX_SLOTS; i++) {
      barrier_init(r.x_full + i * 8, 1);
      barrier_init(r.x_empty + i * 8, WARPS * CLUSTER);
      barrier_init(r.w_full + i * 8, 1);
      barrier_init(r.w_empty + i * 8, WARPS);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  cluster_arrive();
  cluster_wait();
  const Work work(p);
  if (warp >= WARPS) {
    // a warpgroup that feeds gives its registers to those that multiply
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == WARPS) feed_weights(p, r, work, lane);
    if (warp == WARPS + 1) feed_x(p, r, work, &map, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    Accumulators acc;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
    }
    multiply(acc, p, r, work.stop - work.first, warp, lane);
    wait_for_earlier_kernels();
    if (work.row_tile < p.num_row_tiles && add_ranges(acc, p, work)) {
      store(acc, p, work, r.x, warp, lane);
    }
  }
  // the others of the cluster may still write here: barriers, x
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  cluster_wait();
}
