// All layers of a forward pass over one generated row, in one kernel whose blocks stay.
//
// A step of one row is as long as its weights take to arrive, if they never stop arriving. So every warp
// copies the weights that it will multiply into shared memory of its own, SLOTS pieces ahead, across the ends
// of linears and of layers: weights depend on nothing, and while blocks wait for each other, or look up keys,
// the next linear's are on their way. There is one block of 16 warps on every multiprocessor: two teams of 8,
// a warp for each range of the columns (product.cuh). Team i of all takes panels i, i + teams, and so on: a
// panel is 16 rows of weights.
//
// A layer; at every | blocks take what others have computed (stamped.cuh):
//
//   norm, quantise (every block for itself); q, k, v | lanes of attention | merge, quantise |
//   output, added to x | norm, quantise; gate, up | SwiGLU, quantise | down, added to x |
//
// No memory is written anew before all have read it. All of a row is waited for by the norms and by what copies the
// results of attention and SwiGLU, in every block that has panels of the linear that follows; every lane of attention
// waits for its q, k and v, a merge for its lanes, SwiGLU for its columns; and who writes for the next layer
// has been through all of these. A block without panels of a linear takes no part in it and does not wait either.
//
// Registers are scarce: what does not fit into 128 of them goes to memory, past a first-level cache that has next
// to no room beside so much shared memory, and made a step a fifth slower.
//
// Every operation has the arithmetic, and the order of every sum, of the kernels that do it alone (direct.cu,
// rows.cu, attention.cu): the row's bits do not tell which of them computed it.
//
// Compile-time parameters: the weights' form (tile.cuh; one for all linears), ACT and ACT_GROUP
// (product.cuh), those of attention (attention.cuh), NUM_LAYERS, HIDDEN and INNER columns, NORM_FLOAT: the
// norms' weights are float32, not bf16, SLOTS and SLOT_TILES of a warp's ring, LANE_TEAMS of a block that have room
// for a lane of attention, SMEM bytes that a launch asks for.

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
#define MOST_QUERIES (NUM_HEADS / NUM_KV)  // one row's
#define AT_A_TIME 1                        // for fewer registers

#include "layers.cuh"
#include "ring.cuh"
#include "stamped.cuh"
#include "vector.cuh"

// ---- x of a linear in shared memory ---------------------------------------------------------------

// The row, then its scales.
struct Input {
  u32 row, meta;

  DEVICE Input(u32 at, int columns) : row(at), meta(at + COUNT_OF(columns) * X_TILE) {}

  // Columns that do not exist are zeros.
  DEVICE void fill_up(int columns) const {
    const int thread = this_thread();
    const int bytes = columns * (ACT / 8), tail = COUNT_OF(columns) * X_TILE - bytes;
    if (thread < tail / 16) zero_shared4(row + bytes + thread * 16);
#if ACT == 8
    const int groups = columns / ACT_GROUP;
    if (thread < COUNT_OF(columns) * ACT_GROUPS - groups)
      store_shared2(meta + (groups + thread) * 8, make_uint2(0, 0));
#endif
  }

  // A row that other blocks write, as pieces. `gate` is stamped not long before: until then the block
  // leaves the L2 to others.
  template <int COLUMNS>
  DEVICE void copy(const uint4* from, const u32* gate, u32 stamp) const {
    constexpr int all = PIECES_OF(COLUMNS), rounds = (all + ALL_THREADS - 1) / ALL_THREADS;
    constexpr int batch = rounds < MOST_PIECES ? rounds : MOST_PIECES;
    const int thread = this_thread();
    __syncthreads();  // all warps are done with what lies there
    if (thread % 32 == 0)
      look_until_found([&]() { return is_word_of(load_relaxed(gate), stamp); });
    __syncwarp();
#pragma unroll 1
    for (int first = thread; first < all; first += batch * ALL_THREADS) {
      uint4 pieces[batch];
      look_until_found([&]() {
        bool are_there = true;
#pragma unroll
        for (int i = 0; i < batch; i++)
          if (first + i * ALL_THREADS < all) pieces[i] = load_piece(from + first + i * ALL_THREADS);
#pragma unroll
        for (int i = 0; i < batch; i++)
          if (first + i * ALL_THREADS < all) are_there &= is_piece_of(pieces[i], stamp);
        return are_there;
      });
#pragma unroll
      for (int i = 0; i < batch; i++) {
        const int at = first + i * ALL_THREADS;
        const uint4& v = pieces[i];
        if (at >= all) continue;
        if (ACT == 16) store_shared2(row + at * 8, values_of_words(v));
        else if (at < VALUES_OF(COLUMNS)) store_shared2(row + at * 8, make_uint2(v.x, v.z));
        else store_shared2(meta + (at - VALUES_OF(COLUMNS)) * 8, make_uint2(v.x, v.z));
      }
    }
    if (COLUMNS % TILE_COLS) fill_up(COLUMNS);
    __syncthreads();
  }

  // RMSNorm of the residual stream, with the sums of rows.cu: of words, or of x where there are none.
  DEVICE void norm(const Step& s, const u32* words, u32 stamp, const void* weight,
                   float* row_sums) const {
    constexpr int vectors = HIDDEN / 8, warps = (vectors + 31) / 32;  // of rows.cu
    constexpr int rounds = (warps + ALL_WARPS - 1) / ALL_WARPS;
    const int thread = this_thread(), lane = thread % 32, warp = thread / 32;
    const auto vector = [&](int i) { return (warp + i * ALL_WARPS) * 32 + lane; };
    float values[rounds][8] = {};
    uint4 scales[rounds][NORM_FLOAT + 1] = {};  // on their way
#pragma unroll
    for (int i = 0; i < rounds; i++) {
      const int at = vector(i);
      if (at >= vectors) continue;
#pragma unroll
      for (int j = 0; j < NORM_FLOAT + 1; j++)
        scales[i][j] = load_once((const uint4*)weight + at * (NORM_FLOAT + 1) + j);
      if (!words) unpack(*(const uint4*)(s.x + at * 8), values[i]);
    }
    if (words) {
      uint4 pieces[rounds][2] = {};  // set, or the compiler keeps them in memory
      if (lane == 0 && warp * 32 < vectors)  // the others leave the L2 to other blocks until then
        look_until_found([&]() { return is_word_of(load_relaxed(words + warp * 256), stamp); });
      __syncwarp();
      look_until_found([&]() {
        bool are_there = true;
#pragma unroll
        for (int i = 0; i < rounds; i++) {
#pragma unroll
          for (int j = 0; j < 2; j++)
            if (vector(i) < vectors) pieces[i][j] = load_words(words + vector(i) * 8 + j * 4);
        }
#pragma unroll
        for (int i = 0; i < rounds; i++) {
#pragma unroll
          for (int j = 0; j < 2; j++)
            if (vector(i) < vectors) are_there &= are_words_of(pieces[i][j], stamp);
        }
        return are_there;
      });
#pragma unroll
      for (int i = 0; i < rounds; i++) {
        if (vector(i) < vectors) unpack(values_of_words(pieces[i][0], pieces[i][1]), values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < rounds; i++) {
      const float sum = sum_of_warp(add_squares(0.f, values[i]));
      if (lane == 0) row_sums[warp + i * ALL_WARPS] = sum;
    }
    __syncthreads();
    const float sum = sum_of_warp(lane < warps ? row_sums[lane] : 0.f);
    const float factor = factor_of(sum, HIDDEN, s.eps);
#pragma unroll
    for (int i = 0; i < rounds; i++) {
      const int at = vector(i);
      float normed[8], scale[8];
#if NORM_FLOAT
#pragma unroll
      for (int j = 0; j < 8; j++) scale[j] = __uint_as_float((&scales[i][j / 4].x)[j % 4]);
#else
      unpack(scales[i][0], scale);
#endif
#pragma unroll
      for (int j = 0; j < 8; j++) normed[j] = __fmul_rn(__fmul_rn(values[i][j], factor), scale[j]);
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

// The first lane, of all KV heads, that this team works on. The last teams have fewer panels of q, k, v than the
// first.
DEVICE int first_lane() {
  return this_block() + (TEAMS - 1 - this_thread() / THREADS) * gridDim.x;
}

// Where the row sits, at hand for every layer.
struct Places {
  i64 position, slot, context, cu_rows[2];
  float cosines[HALF], sines[HALF];

  DEVICE void read(const Step& s) {
    const i64 at = s.positions[0] * HALF;
    if (threadIdx.x == 0) position = s.positions[0], slot = s.slots[0], context = s.contexts[0];
    if (threadIdx.x < 2) cu_rows[threadIdx.x] = s.cu_rows[threadIdx.x];
    if (threadIdx.x < HALF) {
      cosines[threadIdx.x] = s.cosines[at + threadIdx.x];
      sines[threadIdx.x] = s.sines[at + threadIdx.x];
    }
  }
};

// What a team has in shared memory for a lane.
struct LaneRoom {
  Shared shared;
  u16 fresh[(RATIO + 2) * HEAD];  // the row's queries, its key and its value, of one KV head
};

DEVICE LaneRoom& lane_room() {
  return *(LaneRoom*)(shared + LANES_AT + (TEAMS - 1 - this_thread() / THREADS) * sizeof(LaneRoom));
}

DEVICE Attention attention_of(const Step& s, const LayerTable& layer, const Places& places,
                              const u16* fresh, int kv_head) {
  Attention p;
  // those of its head are in shared memory: they are addressed as if all heads were
  p.q = fresh - kv_head * RATIO * HEAD;
  p.k = fresh + (RATIO - kv_head) * HEAD, p.v = fresh + (RATIO + 1 - kv_head) * HEAD;
  p.q_stride = p.k_stride = p.v_stride = 0;
  // and those of its position as if all positions were
  p.cosines = places.cosines - places.position * HALF, p.sines = places.sines - places.position * HALF;
  p.key_cache = layer.key_cache, p.value_cache = layer.value_cache;
  p.positions = &places.position, p.slots = &places.slot;
  p.cu_rows = places.cu_rows, p.contexts = &places.context;
  p.tables = s.tables, p.table_stride = s.table_stride, p.table_size = s.table_size;
  p.scale = s.scale;
  return p;
}

// Waits for a KV head's part of q, k, v, and leaves it in a team's shared memory.
DEVICE void take_fresh(const Step& s, u16* fresh, int kv_head, u32 stamp) {
  constexpr int pieces = HEAD / 4, all = (RATIO + 2) * pieces;
  const int thread = this_thread() % THREADS;
#pragma unroll
  for (int first = 0; first < all; first += THREADS) {
    const int i = first + thread;
    if (i >= all) break;
    const int other = i - RATIO * pieces;  // of the key and the value
    const int at = other < 0 ? kv_head * RATIO * pieces + i
                             : (NUM_HEADS + kv_head + other / pieces * NUM_KV) * pieces + other % pieces;
    uint4 piece;
    look_until_found([&]() {
      piece = load_words((const uint4*)s.qkv + at);
      return are_words_of(piece, stamp);
    });
    *(uint2*)(fresh + i * 4) = values_of_words(piece);
  }
}

// A team works on one lane of a KV head after the other.
DEVICE void attend(const Step& s, const LayerTable& layer, const Places& places, u32 stamp) {
  LaneRoom& room = lane_room();
  const int unit = this_thread() / THREADS, thread = this_thread() % THREADS;
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int share = warp % SHARES;
  const auto meet_unit = [&]() { meet_at<THREADS>(1 + unit); };
  for (int i = first_lane(); i < NUM_KV * LANES; i += TEAMS * gridDim.x) {
    const int stream = i % LANES, kv_head = i / LANES;
    const auto wait_for_rows = [&]() {
      take_fresh(s, room.fresh, kv_head, stamp);
      meet_unit();
    };
    const auto leave = [&](const Partial& part, int m0, int count) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = half * 8 + g;
        if (m >= count) continue;
        const int at = (kv_head * RATIO + m0 + m) * LANES + stream;
        uint2* to = s.lanes + at * HEAD + share * COLS + 2 * t;
#pragma unroll
        for (int col = 0; col < COLS / 8; col++)
          store_pairs(to + col * 8, __float_as_uint(part.total[col][half * 2]),
                      __float_as_uint(part.total[col][half * 2 + 1]), stamp);
        if (share == 0 && t == 0)
          store_pairs(s.lane_stats + at, __float_as_uint(part.tops[half]),
                      __float_as_uint(part.sums[half * 2]), stamp);
      }
    };
    bool has_left = false;
    const auto finish = [&](const Partial& part, int m0, int count, i64) {
      leave(part, m0, count);
      has_left = true;
      meet_unit();  // the shared memory is free again
    };
    const Attention p = attention_of(s, layer, places, room.fresh, kv_head);
    attend_lanes<false>(room.shared, p, stream, kv_head, 0, thread, 1 + unit, meet_unit, wait_for_rows,
                        finish, i == first_lane());
    if (!has_left) {  // a row of no sequence: context 0; the others wait for its lanes all the same
      Partial none = {};
      none.tops[0] = none.tops[1] = -INFINITE;
      leave(none, 0, RATIO);
    }
  }
}

// The beginning of this team's first lane on its way into shared memory: keys and values of positions before
// the row's, which are there long before it is.
DEVICE void begin_lane(const Step& s, const LayerTable& layer, const Places& places) {
  LaneRoom& room = lane_room();
  const int i = first_lane(), thread = this_thread() % THREADS;
  if (i >= NUM_KV * LANES) return;
  const auto nothing = []() {};
  const auto no_finish = [](const Partial&, int, int, i64) {};
  attend_lanes<true>(room.shared, attention_of(s, layer, places, room.fresh, i / LANES), i % LANES,
                     i / LANES, 0, thread, 0, nothing, nothing, no_finish);
}

// The next norms' weights on their way to the L2.
DEVICE void prefetch(const Step& s, int layer) {
  if (this_block() != gridDim.x - 1) return;
  const int at = this_thread() * LINE;
  if (at >= HIDDEN * (NORM_FLOAT ? 4 : 2)) return;
  prefetch_line((const u8*)s.layers[layer].norm[1] + at);
  if (layer + 1 < NUM_LAYERS) prefetch_line((const u8*)s.layers[layer + 1].norm[0] + at);
}

// The lanes of all heads, a warp for PART columns of one: those warps that are the last to get a lane.
DEVICE void merge_lanes(const Step& s, u32 stamp) {
  const int thread = this_thread(), lane = thread % 32, warp = ALL_WARPS - 1 - thread / 32;
  constexpr int parts = HEAD / PART;
  for (int i = gridDim.x - 1 - this_block() + warp * gridDim.x; i < NUM_HEADS * parts;
       i += ALL_WARPS * gridDim.x) {
    const int head = i / parts, first_col = i % parts * PART;
    uint2 pairs[LANES][PER_LANE];
    uint4 stats;
    look_until_found([&]() {
      stats = load_pairs(s.lane_stats + head * LANES + lane % LANES);
#pragma unroll
      for (int j = 0; j < LANES; j++)
#pragma unroll
        for (int n = 0; n < PER_LANE; n++)
          pairs[j][n] = load_pair(s.lanes + (head * LANES + j) * HEAD + first_col + n * 32 + lane);
      bool are_there = are_pairs_of(stats, stamp);
#pragma unroll
      for (int j = 0; j < LANES; j++)
#pragma unroll
        for (int n = 0; n < PER_LANE; n++) are_there &= pairs[j][n].y == stamp;
      return are_there;
    });
    __syncwarp();
    Found found;
    found.mine = __uint_as_float(lane % (2 * LANES) < LANES ? stats.x : stats.z);
#pragma unroll
    for (int j = 0; j < LANES; j++)
#pragma unroll
      for (int n = 0; n < PER_LANE; n++) found.values[j][n] = __uint_as_float(pairs[j][n].x);
    float all[PER_LANE];
    merge(found, this_thread() % 32, all);
    const int col = head * HEAD + first_col;
#if ACT == 8
    const QuantizedPart quantized(all);
    const u32 word = quantized.word();
    if (lane < PART / 4) store_pair((uint2*)s.attended + col / 4 + lane, word, stamp);
    if (lane < PART / ACT_GROUP) {
      const int2 m = lane ? quantized.meta[PART / ACT_GROUP - 1] : quantized.meta[0];
      store_pairs(s.attended + VALUES_OF(QUERY) + col / ACT_GROUP + lane, m.x, m.y, stamp);
    }
#else
#pragma unroll
    for (int n = 0; n < PER_LANE; n++)
      store_relaxed((u32*)s.attended + col + n * 32 + lane, float_to_bf16(all[n]) << 16 | stamp);
#endif
  }
}

DEVICE void silu_mul(const Step& s, u32 stamp) {
  const int thread = this_thread(), lane = thread % 32, warp = thread / 32;
  constexpr int vectors = INNER / 8, parts = (vectors + 31) / 32;
  for (int i = this_block() + warp * gridDim.x; i < parts; i += ALL_WARPS * gridDim.x) {
    const int at = i * 32 + lane;
    float product[8] = {};
    if (at < vectors) {
      uint4 pieces[4];
      look_until_found([&]() {
        bool are_there = true;
#pragma unroll
        for (int j = 0; j < 4; j++)
          pieces[j] = load_words(s.gate_up + j / 2 * INNER + at * 8 + j % 2 * 4);
#pragma unroll
        for (int j = 0; j < 4; j++) are_there &= are_words_of(pieces[j], stamp);
        return are_there;
      });
      float gate[8], up[8];
#pragma unroll
      for (int j = 0; j < 2; j++)
        unpack(values_of_words(pieces[j * 2], pieces[j * 2 + 1]), j ? up : gate);
#pragma unroll
      for (int j = 0; j < 8; j++) product[j] = silu_of(gate[j], up[j]);
    }
    __syncwarp();
    const uint4 rounded = pack(product);
#if ACT == 8
    unpack(rounded, product);
    const QuantizedVector quantized(product, at & 1);
    if (at >= vectors) continue;
    store_pairs(s.inner + at, quantized.words.x, quantized.words.y, stamp);
    if (at % (ACT_GROUP / 8) == 0)
      store_pairs(s.inner + VALUES_OF(INNER) + at / (ACT_GROUP / 8), quantized.meta.x,
                  quantized.meta.y, stamp);
#else
    if (at >= vectors) continue;
    store_words(s.inner + at * 2, rounded.x, rounded.y, stamp);
    store_words(s.inner + at * 2 + 1, rounded.z, rounded.w, stamp);
#endif
  }
}

// ---- linears -------------------------------------------------------------------------------------

DEVICE float bias_of(const Step& s, const u8* bias, int row) {
  if (!bias) return 0.f;
  return s.bias_is_float ? ((const float*)bias)[row] : bf16_to_float(((const u16*)bias)[row]);
}

DEVICE void multiply(const Step& s, int at_layer, int linear, const Input& input, Ring& ring, u32 sums,
                     u32 stamp) {
  const Lane l = my_lane();
  const Own own;
  const int team = this_thread() / (32 * RANGES), mate = this_thread() % (32 * RANGES);
  const int2 tiles = tiles_of(linear, own.range);
  const u8* const bias = s.layers[at_layer].bias[linear];
  u32* const out = linear == ATTENTION_IN    ? s.qkv
                   : linear == ATTENTION_OUT ? s.after_attention
                   : linear == MLP_IN        ? s.gate_up
                                             : s.after_mlp;
  // what the sums are added to; a row is always of the same team, which has written it itself
  const u32* const residual = linear == MLP_OUT ? s.after_attention
                              : linear == ATTENTION_OUT && at_layer ? s.after_mlp
                                                                    : nullptr;
  Activations start;
  start.row[0] = input.row + l.lane / 8 * 16 + tiles.x * X_TILE;
  start.meta = input.meta + tiles.x * META_TILE;
  int round = 0;
  int row = own.team * TILE_ROWS + mate;  // that this thread finishes, if it is one of the first
  for (int panels = panels_of(linear) - own.team; panels > 0; panels -= Own::stride()) {
    float before = 0.f;
    if (mate < TILE_ROWS) {
      if (residual) before = __uint_as_float(load_relaxed(residual + row) & 0xFFFF0000u);
      else if (linear == ATTENTION_OUT) before = bf16_to_float(s.x[row]);
    }
    Accumulators acc = {};
    Activations x = start;
#pragma unroll 1
    for (int left = tiles.y; left > 0; left -= SLOT_TILES) {
      ring.wait(own);
      const u32 base = own.slots + ring.slot * SLOT_BYTES, rest = base + SLOT_TILES * BASE_BYTES;
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
      ring.advance(s, own);
    }
    const u32 to = sums + (team * 2 + round) * RANGES * SUM_BYTES;
    leave_sums(to + own.range * SUM_BYTES, acc, l);
    meet_at<32 * RANGES>(1 + team);
    if (mate < TILE_ROWS) {
      float sum = load_shared(to + mate * 4);
#pragma unroll
      for (int range = 1; range < RANGES; range++) sum += load_shared(to + range * SUM_BYTES + mate * 4);
      u32 rounded = float_to_bf16(sum + bias_of(s, bias, row));
      if (linear == ATTENTION_OUT || linear == MLP_OUT)
        rounded = float_to_bf16(__fadd_rn(before, bf16_to_float(rounded)));
      if (linear == MLP_OUT && at_layer == NUM_LAYERS - 1) s.x[row] = rounded;
      else store_relaxed(out + row, rounded << 16 | stamp);
    }
    round ^= 1;
    row += Own::stride() * TILE_ROWS;
  }
}

static_assert(LANES_AT + LANE_TEAMS * sizeof(LaneRoom) == SMEM,
              "persistent.py lays shared memory out in another way");

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) layers(const __grid_constant__ Step s) {
  __shared__ float row_sums[2 * ALL_WARPS];
  __shared__ Places places;
  __shared__ volatile u32 last_stamp;  // of the pass before
  const u32 sums = smem_address(shared) + SUMS_AT, room = smem_address(shared) + ROW_AT;

  Ring ring;
  ring.slot = ring.parity = 0;
  {
    const Own own;
    own.feed->layer = own.feed->linear = 0;
    if (this_thread() % 32 < SLOTS) barrier_init(own.barriers + this_thread() % 32 * 8, 1);
    publish_barriers();
    __syncwarp();
    ring.find_tiles(s, own);
    for (int slot = 0; slot < SLOTS; slot++) ring.fetch(s, own, slot);
  }
  wait_for_earlier_kernels();
  places.read(s);
  if (threadIdx.x == 0) last_stamp = *s.counts;
  __syncthreads();
  begin_lane(s, s.layers[0], places);
#pragma unroll 1
  for (int i = 0; i < NUM_LAYERS; i++) {
    const LayerTable& layer = s.layers[i];
    const u32 stamp = (last_stamp + i + 1) & 0xFFFF;
#pragma unroll 1
    for (int linear = 0; linear < LINEARS; linear++) {
      const Input input(room, columns_of(linear));
      // a block that has no panel does not wait for the row either: nobody would wait for the block
      const bool has_panels = blockIdx.x < panels_of(linear);
      if (linear == ATTENTION_OUT) {
        attend(s, layer, places, stamp);
        if (i + 1 < NUM_LAYERS) begin_lane(s, s.layers[i + 1], places);
        merge_lanes(s, stamp);
        const u32* gate = (const u32*)(s.lane_stats + this_thread() / 32 % NUM_HEADS * LANES) + 1;
        if (has_panels) input.copy<QUERY>(s.attended, gate, stamp);
      } else if (linear == MLP_OUT) {
        silu_mul(s, stamp);
        const u32* gate = s.gate_up + this_thread() / 32 * (2 * INNER / ALL_WARPS);
        if (has_panels) input.copy<INNER>(s.inner, gate, stamp);
      } else {
        const u32* words = linear == MLP_IN ? s.after_attention : i ? s.after_mlp : nullptr;
        const u32 wanted = linear == MLP_IN ? stamp : (stamp - 1) & 0xFFFF;
        if (has_panels) input.norm(s, words, wanted, layer.norm[linear / 2], row_sums);
        if (linear == ATTENTION_IN) prefetch(s, i);
      }
      multiply(s, i, linear, input, ring, sums, stamp);
    }
  }
  // the last of all blocks keeps the stamp
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(s.counts + 1, 1) == gridDim.x - 1) {
      s.counts[0] = last_stamp + NUM_LAYERS;
      s.counts[1] = 0;
    }
  }
}
