// All layers of a forward pass over one generated row, in one kernel whose blocks stay.
//
// A step of one row is as long as its weights take to arrive, if they never stop arriving. So every warp
// copies the weights that it will multiply into shared memory of its own, SLOTS pieces ahead, across the ends
// of linears and of layers: weights depend on nothing, and while blocks wait for each other, or look up keys,
// the next linear's are on their way. There is one block of 16 warps on every multiprocessor: two teams of 8,
// a warp for each range of the columns (product.cuh). Team i of all takes panels i, i + teams, and so on: a
// panel is 16 rows of weights.
//
// A layer, with a meeting of all blocks at every |:
//
//   norm, quantise (every block for itself); q, k, v | lanes of attention | merge, quantise |
//   output, added to x | norm, quantise; gate, up | SwiGLU, quantise | down, added to x |
//
// Every operation has the arithmetic, and the order of every sum, of the kernels that do it alone (direct.cu,
// rows.cu, attention.cu): the row's bits do not tell which of them computed it.
//
// Compile-time parameters: the weights' form (tile.cuh; one for all linears), ACT and ACT_GROUP
// (product.cuh), those of attention (attention.cuh), NUM_LAYERS, HIDDEN and INNER columns, NORM_FLOAT: the
// norms' weights are float32, not bf16, SLOTS and SLOT_TILES of a warp's ring.

#define NT 1
#define RT 1
#define ONE_TOKEN 1
#define SHARED_SCALES 1
#if ACT == 8
#define QUANT_GROUP ACT_GROUP
#else
#define QUANT_GROUP 0
#endif
#define CLUSTER 8  // every lane of attention has its team
#define ROTATE 1
#define MT 1

#include "attention.cuh"
#include "product.cuh"
#include "vector.cuh"

#define ALL_WARPS 16
#define ALL_THREADS (32 * ALL_WARPS)
#define TEAMS 2  // of a block
#define QUERY (NUM_HEADS * HEAD)
#define QKV (QUERY + 2 * NUM_KV * HEAD)
#define SLOT_BYTES (SLOT_TILES * (BASE_BYTES + REST_BYTES))
#define RING_BYTES (ALL_WARPS * SLOTS * SLOT_BYTES)
#define SUMS_BYTES (2 * TEAMS * RANGES * SUM_BYTES)  // two buffers for each team
#define COUNT_OF(columns) (((columns) + TILE_COLS - 1) / TILE_COLS)
#define LINE 128  // bytes of a line of the L2

enum { ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, LINEARS };

struct LayerTable {
  const u8* base[LINEARS];  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest[LINEARS];
  const u8* bias[LINEARS];  // or null
  const void* norm[2];
  u16 *key_cache, *value_cache;
};

struct Step {
  LayerTable layers[NUM_LAYERS];
  u16* x;              // [HIDDEN], the residual stream before and after
  u16* qkv;            // [QKV]
  u16* attended;       // [QUERY], bf16 or codes
  int2* attended_meta;
  u16* gate_up;        // [2 INNER]
  u16* inner;          // [INNER], bf16 or codes
  int2* inner_meta;
  float* lanes;        // [heads][LANES][HEAD] of attention
  float2* lane_stats;  // [heads][LANES] {top, sum}
  u32* meetings;       // {arrivals, blocks that are done}, zeros
  const float *cosines, *sines;
  const i64 *positions, *slots, *cu_rows, *contexts, *tables;
  int table_stride, table_size;
  int bias_is_float;
  float eps, scale;
};

DEVICE int columns_of(int linear) {
  return linear == ATTENTION_OUT ? QUERY : linear == MLP_OUT ? INNER : HIDDEN;
}

DEVICE int panels_of(int linear) {
  const int rows = linear == ATTENTION_IN ? QKV : linear == MLP_IN ? 2 * INNER : HIDDEN;
  return rows / TILE_ROWS;
}

// A range's tiles of columns: the first, and how many.
DEVICE int2 tiles_of(int linear, int range) {
  const int tiles = COUNT_OF(columns_of(linear)), first = tiles * range / RANGES;
  return make_int2(first, tiles * (range + 1) / RANGES - first);
}

// ---- meetings of all blocks ----------------------------------------------------------------------

// What this block has written is visible to blocks that have waited for `count` meetings.
DEVICE void arrive_at_meeting(u32* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) count_up(arrivals);
}

// For one thread of those that wait; a barrier among them has to follow.
DEVICE void await_meeting(const u32* arrivals, int count) {
  const u32 wanted = count * gridDim.x;
#pragma unroll 1
  for (u32 tries = 0; tries < 1u << 23; tries++) {  // some seconds: a block is lost
    if (read_count(arrivals) >= wanted) return;
  }
  __trap();
}

// ---- weights -------------------------------------------------------------------------------------

// The weights of a warp's range, of all its panels, linears and layers, one after the other.
struct Ring {
  u32 slots, barriers;  // shared addresses
  int range, team, stride;
  // the next tiles to copy: `left` of a panel's `count`; `panels` lie from there to the end, of which every
  // stride-th is this warp's
  const u8 *base, *rest;
  int left, count, panels, jump, layer, linear;
  int slot;  // the next one to read
  u32 parity;
  u64 policy;

  // The next linear of which this warp has tiles.
  DEVICE void find_tiles(const Step& s) {
    left = 0;
    while (layer < NUM_LAYERS) {
      const int2 tiles = tiles_of(linear, range);
      const int columns = COUNT_OF(columns_of(linear));
      const size_t at = (size_t)team * columns + tiles.x;
      panels = panels_of(linear) - team;
      count = tiles.y, jump = stride * columns - count;
      base = s.layers[layer].base[linear] + at * BASE_BYTES;
      rest = s.layers[layer].rest[linear] + at * REST_BYTES;
      if (++linear == LINEARS) linear = 0, layer++;
      if (panels > 0 && count) {
        left = count;
        return;
      }
    }
  }

  DEVICE void fetch(const Step& s, int to) {
    if (left == 0) return;
    const int n = min(SLOT_TILES, left);
    const u32 at = slots + to * SLOT_BYTES;
    bulk_load_by_warp(at, base, n * BASE_BYTES, at + SLOT_TILES * BASE_BYTES, rest, n * REST_BYTES,
                      barriers + to * 8, policy);
    base += n * BASE_BYTES, rest += n * REST_BYTES;
    left -= n;
    if (left) return;
    panels -= stride;
    if (panels > 0) {
      base += (size_t)jump * BASE_BYTES, rest += (size_t)jump * REST_BYTES;
      left = count;
    } else {
      find_tiles(s);
    }
  }

  DEVICE void wait() const { barrier_wait(barriers + slot * 8, parity); }

  // The slot has been read: fetches into it, and goes on to the next.
  DEVICE void advance(const Step& s) {
    __syncwarp();
    fetch(s, slot);
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

// A tile out of shared memory.
DEVICE void take_tile(Weights& w, u32 base, u32 rest, const Lane& l) {
  const u32 at = base + l.lane * 16;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    w.q4[h] = load_shared4(at + nibbles_at(h));
#if BITS != 4
    w.r4[h] = load_shared4(rest + l.lane * 16 + nibbles_at(h));
#endif
#if BITS == 16
    w.r8[h][0] = load_shared4(rest + l.lane * 16 + bytes_at(h, 0));
    w.r8[h][1] = load_shared4(rest + l.lane * 16 + bytes_at(h, 1));
#endif
  }
  w.scales = base + scale_at(0, l.g, 0);
#if OFFSET
  w.offsets = base + scale_at(0, l.g, 1);
#endif
}

// ---- x of a linear in shared memory ---------------------------------------------------------------

// The row, then its scales.
struct Input {
  u32 row, meta;

  DEVICE Input(u32 at, int columns) : row(at), meta(at + COUNT_OF(columns) * X_TILE) {}

  // Columns that do not exist are zeros.
  DEVICE void fill_up(int columns) const {
    const int bytes = columns * (ACT / 8), tail = COUNT_OF(columns) * X_TILE - bytes;
    if (threadIdx.x < tail / 16) zero_shared4(row + bytes + threadIdx.x * 16);
#if ACT == 8
    const int groups = columns / ACT_GROUP;
    if (threadIdx.x < COUNT_OF(columns) * ACT_GROUPS - groups)
      store_shared2(meta + (groups + threadIdx.x) * 8, make_uint2(0, 0));
#endif
  }

  // A row that other blocks have written, bf16 or codes with their scales.
  DEVICE void copy(const u16* from, const int2* from_meta, int columns) const {
    for (int i = threadIdx.x; i < columns * (ACT / 8) / 16; i += ALL_THREADS)
      copy16(row + i * 16, (const uint4*)from + i);
#if ACT == 8
    for (int i = threadIdx.x; i < columns / ACT_GROUP; i += ALL_THREADS)
      store_shared2(meta + i * 8, ((const uint2*)from_meta)[i]);
#endif
    copy_commit();
    if (columns % TILE_COLS) fill_up(columns);
    copy_wait<0>();
    __syncthreads();
  }

  // RMSNorm of x, with the sums of rows.cu.
  DEVICE void norm(const Step& s, const void* weight, float* row_sums) const {
    constexpr int vectors = HIDDEN / 8, warps = (vectors + 31) / 32;  // of rows.cu
    constexpr int rounds = (warps + ALL_WARPS - 1) / ALL_WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float values[rounds][8], scale[rounds][8] = {};
#pragma unroll
    for (int i = 0; i < rounds; i++) {
      const int at = (warp + i * ALL_WARPS) * 32 + lane;
      uint4 held = make_uint4(0, 0, 0, 0);
      if (at < vectors) {
        held = *(const uint4*)(s.x + at * 8);
#if NORM_FLOAT
        *(float4*)scale[i] = ((const float4*)weight)[at * 2];
        *(float4*)(scale[i] + 4) = ((const float4*)weight)[at * 2 + 1];
#else
        unpack(((const uint4*)weight)[at], scale[i]);
#endif
      }
      unpack(held, values[i]);
    }
#pragma unroll
    for (int i = 0; i < rounds; i++) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) sum = __fadd_rn(sum, __fmul_rn(values[i][j], values[i][j]));
#pragma unroll
      for (int step = 16; step; step >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
      if (lane == 0) row_sums[warp + i * ALL_WARPS] = sum;
    }
    __syncthreads();
    float sum = lane < warps ? row_sums[lane] : 0.f;
#pragma unroll
    for (int step = 16; step; step >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
    const float factor = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)HIDDEN), s.eps)));
#pragma unroll
    for (int i = 0; i < rounds; i++) {
      const int at = (warp + i * ALL_WARPS) * 32 + lane;
      float normed[8];
#pragma unroll
      for (int j = 0; j < 8; j++) normed[j] = __fmul_rn(__fmul_rn(values[i][j], factor), scale[i][j]);
      const uint4 rounded = pack(normed);
#if ACT == 8
      unpack(rounded, normed);
      const QuantizedVector quantized(normed, at & 1);
      if (at >= vectors) continue;
      store_shared2(row + at * 8, quantized.words);
      if (at % (ACT_GROUP / 8) == 0)
        store_shared2(meta + at / (ACT_GROUP / 8) * 8, make_uint2(quantized.meta.x, quantized.meta.y));
#else
      if (at < vectors) store_shared4(row + at * 16, rounded);
#endif
    }
    if (HIDDEN % TILE_COLS) fill_up(HIDDEN);
    __syncthreads();
  }
};

// ---- what blocks do between linears ---------------------------------------------------------------

// Where the row sits, at hand for every layer.
struct Places {
  i64 position, slot, context, cu_rows[2];

  DEVICE void read(const Step& s) {
    if (threadIdx.x == 0) position = s.positions[0], slot = s.slots[0], context = s.contexts[0];
    if (threadIdx.x < 2) cu_rows[threadIdx.x] = s.cu_rows[threadIdx.x];
  }
};

DEVICE Attention attention_of(const Step& s, const LayerTable& layer, const Places& places) {
  Attention p;
  p.q = s.qkv, p.k = s.qkv + QUERY, p.v = s.qkv + QUERY + NUM_KV * HEAD;
  p.q_stride = p.k_stride = p.v_stride = QKV;
  p.cosines = s.cosines, p.sines = s.sines;
  p.key_cache = layer.key_cache, p.value_cache = layer.value_cache;
  p.positions = &places.position, p.slots = &places.slot;
  p.cu_rows = places.cu_rows, p.contexts = &places.context;
  p.tables = s.tables, p.table_stride = s.table_stride, p.table_size = s.table_size;
  p.scale = s.scale;
  return p;
}

// A team works on one lane of a KV head after the other.
DEVICE void attend(const Step& s, const LayerTable& layer, const Places& places, Shared& sh,
                   int meetings) {
  const Attention p = attention_of(s, layer, places);
  const int unit = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int share = warp % SHARES;
  bool has_waited = false;
  const auto meet_unit = [&]() { meet_at<THREADS>(1 + unit); };
  const auto wait_for_rows = [&]() {
    if (has_waited) return;
    has_waited = true;
    if (thread == 0) await_meeting(s.meetings, meetings);
    meet_unit();
  };
  for (int i = blockIdx.x + unit * gridDim.x; i < NUM_KV * LANES; i += TEAMS * gridDim.x) {
    const int stream = i % LANES, kv_head = i / LANES;
    const auto finish = [&](const Partial& part, int m0, int count, i64) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = half * 8 + g;
        if (m >= count) continue;
        const int head = kv_head * RATIO + m0 + m;
        float* to = s.lanes + (head * LANES + stream) * HEAD + share * COLS + 2 * t;
#pragma unroll
        for (int col = 0; col < COLS / 8; col++)
          *(float2*)(to + col * 8) =
              make_float2(part.total[col][half * 2], part.total[col][half * 2 + 1]);
        if (share == 0 && t == 0)
          s.lane_stats[head * LANES + stream] = make_float2(part.tops[half], part.sums[half * 2]);
      }
      meet_unit();  // the shared memory is free again
    };
    attend_lanes(sh, p, stream, kv_head, 0, thread, 1 + unit, meet_unit, wait_for_rows, finish);
  }
  wait_for_rows();
}

// The beginning of this team's first lane, and the next norms' weights, on their way to the L2 while q, k, v
// are computed.
DEVICE void prefetch(const Step& s, int layer, const Places& places) {
  constexpr int lines = HEAD * 2 / LINE;  // of a key
  if (blockIdx.x == gridDim.x - 1) {
    const int at = threadIdx.x * LINE;
    if (at < HIDDEN * (NORM_FLOAT ? 4 : 2)) {
      prefetch_line((const u8*)s.layers[layer].norm[1] + at);
      if (layer + 1 < NUM_LAYERS) prefetch_line((const u8*)s.layers[layer + 1].norm[0] + at);
    }
  }
  const int i = blockIdx.x + threadIdx.x / THREADS * gridDim.x;
  if (i >= NUM_KV * LANES) return;
  const int stream = i % LANES, kv_head = i / LANES;
  for (int n = threadIdx.x % THREADS; n < 4 * CHUNK * 2 * lines; n += THREADS) {
    const int at = n / (2 * lines), key = (stream + at / CHUNK * LANES) * CHUNK + at % CHUNK;
    if (key >= places.context) break;
    const i64 slot = s.tables[key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
    const u16* cache = n / lines % 2 ? s.layers[layer].value_cache : s.layers[layer].key_cache;
    prefetch_line(cache + (slot * NUM_KV + kv_head) * HEAD + n % lines * (LINE / 2));
  }
}

// The lanes of all heads, a warp for PART columns of one.
DEVICE void merge_lanes(const Step& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int parts = HEAD / PART;
  for (int i = blockIdx.x + warp * gridDim.x; i < NUM_HEADS * parts; i += ALL_WARPS * gridDim.x) {
    const int head = i / parts, first_col = i % parts * PART;
    Found found;
#pragma unroll
    for (int j = 0; j < LANES; j++)
#pragma unroll
      for (int n = 0; n < 2; n++)
        found.values[j][n] = s.lanes[(head * LANES + j) * HEAD + first_col + n * 32 + lane];
    const float2 stats = s.lane_stats[head * LANES + lane % LANES];
    found.mine = lane % (2 * LANES) < LANES ? stats.x : stats.y;
    float all[2];
    merge(found, all);
    write(all, 0, head * HEAD + first_col, s.attended, (u8*)s.attended, s.attended_meta, 1);
  }
}

DEVICE void silu_mul(const Step& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int vectors = INNER / 8, parts = (vectors + 31) / 32;
  for (int i = blockIdx.x + warp * gridDim.x; i < parts; i += ALL_WARPS * gridDim.x) {
    const int at = i * 32 + lane;
    float product[8] = {};
    if (at < vectors) {
      float gate[8], up[8];
      unpack(*(const uint4*)(s.gate_up + at * 8), gate);
      unpack(*(const uint4*)(s.gate_up + INNER + at * 8), up);
#pragma unroll
      for (int j = 0; j < 8; j++) product[j] = silu_of(gate[j], up[j]);
    }
    const uint4 rounded = pack(product);
#if ACT == 8
    unpack(rounded, product);
    const QuantizedVector quantized(product, at & 1);
    if (at >= vectors) continue;
    *(uint2*)((u8*)s.inner + at * 8) = quantized.words;
    if (at % (ACT_GROUP / 8) == 0) s.inner_meta[at / (ACT_GROUP / 8)] = quantized.meta;
#else
    if (at < vectors) *(uint4*)(s.inner + at * 8) = rounded;
#endif
  }
}

// ---- linears -------------------------------------------------------------------------------------

DEVICE float bias_of(const Step& s, const u8* bias, int row) {
  if (!bias) return 0.f;
  return s.bias_is_float ? ((const float*)bias)[row] : bf16_to_float(((const u16*)bias)[row]);
}

DEVICE void multiply(const Step& s, const LayerTable& layer, int linear, const Input& input, Ring& ring,
                     u32 sums, const Lane& l) {
  const int team = threadIdx.x / (32 * RANGES), mate = threadIdx.x % (32 * RANGES);
  const int2 tiles = tiles_of(linear, ring.range);
  const bool is_added = linear == ATTENTION_OUT || linear == MLP_OUT;
  Activations start;
  start.row[0] = input.row + l.lane / 8 * 16 + tiles.x * X_TILE;
  start.meta = input.meta + tiles.x * META_TILE;
  int round = 0;
  for (int panel = ring.team; panel < panels_of(linear); panel += ring.stride) {
    const int row = panel * TILE_ROWS + mate;  // that this thread finishes, if it is one of the first
    float before = 0.f;
    if (is_added && mate < TILE_ROWS) before = bf16_to_float(s.x[row]);
    Accumulators acc = {};
    Activations x = start;
#pragma unroll 1
    for (int left = tiles.y; left > 0; left -= SLOT_TILES) {
      ring.wait();
      const u32 base = ring.slots + ring.slot * SLOT_BYTES, rest = base + SLOT_TILES * BASE_BYTES;
      const Stream none[1] = {};
      if (left >= SLOT_TILES) {  // without a branch between tiles, whose latencies overlap
        Weights w[SLOT_TILES][1];
#pragma unroll
        for (int i = 0; i < SLOT_TILES; i++)
          take_tile(w[i][0], base + i * BASE_BYTES, rest + i * REST_BYTES, l);
#pragma unroll
        for (int i = 0; i < SLOT_TILES; i++) {
          multiply_tile(acc, l, w[i], x, none, false);
          x.row[0] += X_TILE;
          x.meta += META_TILE;
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < left; i++) {
          Weights w[1];
          take_tile(w[0], base + i * BASE_BYTES, rest + i * REST_BYTES, l);
          multiply_tile(acc, l, w, x, none, false);
          x.row[0] += X_TILE;
          x.meta += META_TILE;
        }
      }
      ring.advance(s);
    }
    const u32 to = sums + (team * 2 + round) * RANGES * SUM_BYTES;
    leave_sums(to + ring.range * SUM_BYTES, acc, l);
    meet_at<32 * RANGES>(1 + team);
    if (mate < TILE_ROWS) {
      float sum = load_shared(to + mate * 4);
#pragma unroll
      for (int range = 1; range < RANGES; range++) sum += load_shared(to + range * SUM_BYTES + mate * 4);
      const u16 rounded = float_to_bf16(sum + bias_of(s, layer.bias[linear], row));
      if (is_added) s.x[row] = float_to_bf16(__fadd_rn(before, bf16_to_float(rounded)));
      else (linear == ATTENTION_IN ? s.qkv : s.gate_up)[row] = rounded;
    }
    round ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) layers(const __grid_constant__ Step s) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ float row_sums[2 * ALL_WARPS];
  __shared__ Places places;
  const Lane l = my_lane();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be the same in all lanes
  const u32 rings = smem_address(shared), barriers = rings + RING_BYTES;
  const u32 sums = barriers + ALL_WARPS * SLOTS * 8, room = sums + SUMS_BYTES;
  Shared& lanes = *(Shared*)(shared + (room - rings) + threadIdx.x / THREADS * sizeof(Shared));

  Ring ring;
  ring.slots = rings + warp * SLOTS * SLOT_BYTES;
  ring.barriers = barriers + warp * SLOTS * 8;
  ring.range = warp % RANGES;
  ring.team = warp / RANGES * gridDim.x + blockIdx.x;
  ring.stride = TEAMS * gridDim.x;
  ring.layer = ring.linear = ring.slot = ring.parity = 0;
  ring.policy = evict_first_policy();
  if (l.lane < SLOTS) barrier_init(ring.barriers + l.lane * 8, 1);
  publish_barriers();
  __syncwarp();
  ring.find_tiles(s);
  for (int slot = 0; slot < SLOTS; slot++) ring.fetch(s, slot);
  wait_for_earlier_kernels();
  places.read(s);

  int meetings = 0;
  const auto meet = [&]() {  // all blocks
    arrive_at_meeting(s.meetings);
    meetings++;
    if (threadIdx.x == 0) await_meeting(s.meetings, meetings);
    __syncthreads();
  };
  for (int i = 0; i < NUM_LAYERS; i++) {
    const LayerTable& layer = s.layers[i];
#pragma unroll 1
    for (int linear = 0; linear < LINEARS; linear++) {
      const Input input(room, columns_of(linear));
      if (linear == ATTENTION_OUT) {
        arrive_at_meeting(s.meetings);
        attend(s, layer, places, lanes, ++meetings);
        meet();
        merge_lanes(s);
        meet();
        input.copy(s.attended, s.attended_meta, QUERY);
      } else if (linear == MLP_OUT) {
        meet();
        silu_mul(s);
        meet();
        input.copy(s.inner, s.inner_meta, INNER);
      } else {
        if (i || linear) meet();
        input.norm(s, layer.norm[linear / 2], row_sums);
        if (linear == ATTENTION_IN) prefetch(s, i, places);
      }
      multiply(s, layer, linear, input, ring, sums, l);
    }
  }
  // the last of all blocks leaves the counts as they were
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(s.meetings + 1, 1) == gridDim.x - 1) s.meetings[0] = s.meetings[1] = 0;
  }
}
