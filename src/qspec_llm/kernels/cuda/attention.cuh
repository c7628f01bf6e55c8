// Attention of generated positions: what a team of warps does with its lane of keys, and the merge of lanes.
//
// The keys are cut into chunks of CHUNK, and chunk c belongs to lane c % LANES. A lane takes its chunks
// in order with a running maximum (Milakov and Gimelshein 2018); then the lanes are merged in their
// order. So which keys meet in which order depends on their positions alone, and keys beyond a query
// change nothing: its result is the same whatever is computed with it.
//
// A lane is the work of a team of warps that needs no other one until the merge. Of a unit of keys each
// warp of a team computes the scores and the weights of 16, of the result the columns that are its share; so
// a team meets for its tops and for its weights before it adds values. A warp that has a lane for
// itself keeps both in registers. Who else shares a lane, or how many lanes a block has, changes no sum. A
// lane keeps STAGES units of keys or values in shared memory or on their way.
//
// With ROTATE the rows' places and the keys and values before them are read before the rows themselves are
// there: nothing that still runs may write those.
//
// Defines: HEAD 64 or 128, NUM_HEADS, NUM_KV, BLOCK_SIZE, a multiple of 16; MT: QUERIES = 16 MT;
// CLUSTER: lanes that meet belong to 1, 2, 4 or 8 groups of threads (blocks, in attention.cu); STAGES;
// ROTATE 1: q, k, v come unrotated, and keys from the first row's position on come from them; 0: q is ready
// and every key is in the cache; QUANT_GROUP 0, 32, 64 or 128 and TOP: how the result is quantised. UNIT: keys
// of a unit, whole chunks, where it is not 16 for each warp that shares a lane.

#pragma once
#include "ptx.cuh"
#include "quantize.cuh"

#define LANES 8
#define CHUNK 32
#define PLACED 16              // keys that lie side by side in the cache
#define OWN (LANES / CLUSTER)  // lanes of a block
#define SHARES (8 / OWN)       // warps among which a lane's columns are shared out
#define TEAM (SHARES * MT)     // warps of a lane
#define WARPS (OWN * TEAM)
#define THREADS (32 * WARPS)
#define QUERIES (16 * MT)
#define HALF (HEAD / 2)
#define RATIO (NUM_HEADS / NUM_KV)
#define PITCH (HEAD + 8)             // of rows in shared memory: an odd number of 16-byte units
#define PIECES (HEAD / 8)            // 16-byte pieces of a row
#define COPIED (32 * TEAM / PIECES)  // rows that a team copies at a time
#define COLS (HEAD / SHARES)         // of the result, for a warp
#define PART (QUANT_GROUP > 64 ? QUANT_GROUP : 64)  // columns of the result that a warp merges
#define PER_LANE (PART / 32)
#ifndef UNIT
#define UNIT (16 * SHARES)  // keys, or values: half a chunk or whole ones
#endif
#ifndef MOST_QUERIES
#define MOST_QUERIES QUERIES  // that there are at a time: fewer only with MT 1
#endif
#define QUERY_HALVES ((MOST_QUERIES - 1) % 16 / 8 + 1)  // of 16 queries, those that are not all missing
#define TURNS ((MOST_QUERIES * HALF + THREADS - 1) / THREADS)  // pairs of the queries' columns for a thread
#ifndef AT_A_TIME
#define AT_A_TIME (UNIT / COPIED)  // copies of a thread whose addresses are computed together
#endif
#define HALVES (SHARES == 1 ? 2 : 1)
#define BEGUN (STAGES - (SHARES == 1))  // units asked for before the first is looked at
#define SPAN (UNIT * HALVES / CHUNK)  // chunks whose keys come in HALVES units, and then their values
#define WINDOW (16 / SPAN * SPAN)     // chunks of whose places a lane keeps one at a time
#define LOG2E 1.4426950408889634f
#define INFINITE __int_as_float(0x7f800000)
#define ONES 0x3F803F80u  // two of bf16

typedef long long i64;

DEVICE u32 rotated_pair(u32 low, u32 high, float c, float s) {
  const float a = bf16_to_float(low), b = bf16_to_float(high);
  return pack_bf16(__fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s)),
                   __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s)));
}

static_assert(UNIT <= 16 * SHARES, "a warp scores 16 keys at a time");
typedef u16 Unit[UNIT][PITCH];  // keys or values

struct Shared {
  u16 queries[MOST_QUERIES][PITCH];
  float tops[OWN][QUERIES], sums[OWN][QUERIES];  // other blocks read them, and the result
#if SHARES > 1
  float unit_tops[OWN][MOST_QUERIES][(UNIT / 16 + 3) / 4 * 4];  // of 16 keys each
  u16 weights[OWN][MOST_QUERIES][UNIT + 8];
#endif
  union {
    Unit ring[OWN][STAGES];
    float result[OWN][QUERIES][HEAD + 4];  // once the block needs no more keys
  };
};

// Waits for the warps of a team; what they wrote to shared memory before is visible after.
DEVICE void meet_team(int barrier) {
#if TEAM == 1
  __syncwarp();
#else
  meet_at<32 * TEAM>(barrier);
#endif
}

struct Attention {
  const u16 *q, *k, *v;
  int q_stride, k_stride, v_stride;
  const float *cosines, *sines;
  u16 *key_cache, *value_cache;
  const i64 *positions, *slots, *cu_rows, *contexts, *tables;
  int table_stride, table_size;
  float scale;
};

// What a thread holds of a lane's result: two queries, COLS columns of its warp.
struct Partial {
  float total[COLS / 8][4], sums[4], tops[2];
};

// The lanes' results for columns lane, lane + 32, .. of PART ones; `mine` is the top of lane j of chunks in
// the warp's lanes j and the sum of its weights in lanes LANES + j.
struct Found {
  float values[LANES][PER_LANE], mine;
};

// The lanes in their order.
DEVICE void merge(const Found& found, int lane, float (&all)[PER_LANE]) {
  const bool is_top = lane % (2 * LANES) < LANES;
  float top = is_top ? found.mine : -INFINITE;
#pragma unroll
  for (int step = LANES; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const float weights = exp2_of(found.mine - (top == -INFINITE ? 0.f : top));  // of lanes with tops
  float sum = 0.f;
#pragma unroll
  for (int n = 0; n < PER_LANE; n++) all[n] = 0.f;
#pragma unroll
  for (int j = 0; j < LANES; j++) {
    const float weight = __shfl_sync(~0u, weights, j);
    sum = __fadd_rn(sum, __fmul_rn(weight, __shfl_sync(~0u, found.mine, LANES + j)));
#pragma unroll
    for (int n = 0; n < PER_LANE; n++)
      all[n] = __fadd_rn(all[n], __fmul_rn(weight, found.values[j][n]));
  }
#pragma unroll
  for (int n = 0; n < PER_LANE; n++) all[n] = __fdiv_rn(all[n], sum == 0.f ? 1.f : sum);
}

#if QUANT_GROUP
// PART columns of one finished query, of which a lane holds columns lane, lane + 32, .., as codes. All lanes
// of a warp call it.
struct QuantizedPart {
  int codes[PER_LANE];
  int2 meta[PART / QUANT_GROUP];

  DEVICE explicit QuantizedPart(const float (&exact)[PER_LANE]) {
#pragma unroll
    for (int group = 0; group < PART / QUANT_GROUP; group++) {
      float value[QUANT_GROUP / 32], top = 0.f;
#pragma unroll
      for (int i = 0; i < QUANT_GROUP / 32; i++) {
        value[i] = bf16_to_float(float_to_bf16(exact[group * (QUANT_GROUP / 32) + i]));
        top = fmaxf(top, fabsf(value[i]));
      }
#pragma unroll
      for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      const Scale scale(top);
      int sum = 0;
#pragma unroll
      for (int i = 0; i < QUANT_GROUP / 32; i++) {
        const int code = (signed char)scale.code(value[i]);
        codes[group * (QUANT_GROUP / 32) + i] = code;
        sum += code;
      }
      meta[group] = make_int2(__float_as_int(scale.value), __reduce_add_sync(~0u, sum));
    }
  }

  // Four codes, of those that lie at 4 lane of PART.
  DEVICE u32 word() const {
    const int lane = this_thread() & 31;
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) mine |= (codes[i] & 255) << (i * 8);
    const int first = (lane % 8 / 4) * 16 + lane % 4 * 2;
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // of every 16 columns the two halves of 8 are interleaved
      const u32 other = __shfl_sync(~0u, mine, first + i % 2 * 8 + i / 2);
      found |= (other >> (lane / 8 % PER_LANE * 8) & 255) << (i * 8);
    }
    return found;
  }
};
#endif

// PART columns of one finished query, by one warp: columns lane, lane + 32, ..
DEVICE void write(const float (&exact)[PER_LANE], i64 row, int first_col, u16* out, u8* codes, int2* meta,
                  int pitch) {
  const int lane = threadIdx.x & 31;
#if QUANT_GROUP
  const QuantizedPart quantized(exact);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int col = first_col + i * 32 + lane;
    // of every 16 columns the two halves of 8 are interleaved
    const int at = (col & ~15) + ((col & 7) << 1) + ((col >> 3) & 1);
    codes[row * (NUM_HEADS * HEAD) + at] = (u8)quantized.codes[i];
  }
  if (lane == 0) {
#pragma unroll
    for (int group = 0; group < PART / QUANT_GROUP; group++)
      meta[(i64)(first_col / QUANT_GROUP + group) * pitch + row] = quantized.meta[group];
  }
#else
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    out[row * (NUM_HEADS * HEAD) + first_col + i * 32 + lane] = (u16)float_to_bf16(exact[i]);
#endif
}

// The lanes of a group of threads, OWN of them from lane `rank` on in steps of CLUSTER, of one KV head of one
// sequence, for all its queries, QUERIES at a time.
//
//   thread           this one of THREADS
//   first_barrier    named barriers from here on are the teams'
//   meet_unit        waits for all THREADS threads
//   wait_for_rows    returns when q, k, v may be read; every thread calls it once
//   finish           takes a thread's results: Partial, the first query, how many, the sequence's first row
//   has_begun        the first copies of keys and values are under way; with BEGINS that is all that is done
template <bool BEGINS, class Meet, class Wait, class Finish>
DEVICE void attend_lanes(Shared& sh, const Attention& p, int rank, int kv_head, int seq, int thread,
                         int first_barrier, const Meet& meet_unit, const Wait& wait_for_rows,
                         const Finish& finish, bool has_begun = false) {
  const int lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int team = warp / TEAM, tile = warp % MT, share = warp / MT % SHARES;
  const int mate = thread % (32 * TEAM);     // this thread in its team
  const int stream = rank + team * CLUSTER;  // the lane of chunks

  // where the keys of the stream's next WINDOW chunks lie: for lane i of a warp, PLACED keys of chunk i / 2
  const i64* table = p.tables + (i64)seq * p.table_stride;
  const auto places_from = [&](int chunk) {
    const int key = (stream + (chunk + lane / 2) * LANES) * CHUNK + lane % 2 * PLACED;
    return (int)table[min(key / BLOCK_SIZE, p.table_size - 1)] * BLOCK_SIZE + key % BLOCK_SIZE;
  };
  int places = places_from(0);
  const int context = (int)p.contexts[seq];
  const i64 first = p.cu_rows[seq];
  const int num_queries = (int)(p.cu_rows[seq + 1] - first) * RATIO;
  if (context == 0) {  // for all lanes of the sequence
    if (!BEGINS) wait_for_rows();
    return;
  }
  const int first_position = (int)p.positions[first];
  const int fresh = ROTATE ? first_position : context;  // later keys are in k and v
  const int num_chunks = (context + CHUNK - 1) / CHUNK;
  const int num_mine = (num_chunks - stream + LANES - 1) / LANES;  // of the stream
  const int num_units = (num_mine + SPAN - 1) / SPAN * (2 * HALVES);
  // the spans before this one have old keys only
  const int fresh_span = max(0, (fresh / CHUNK - stream + LANES - 1) / LANES) / SPAN;
  const float factor = __fmul_rn(p.scale, LOG2E);
  const int mate_row = mate / PIECES, mate_col = mate % PIECES * 8;

  // Starts the copies of what the cache has of a unit of the stream; rows past the context are zeros.
  const auto fetch_old = [&](int unit) {
    if (unit < num_units) {
      const int chunk = unit / (2 * HALVES) * SPAN, half = unit % HALVES;
      if (chunk % WINDOW == 0 && unit % (2 * HALVES) == 0 && unit) places = places_from(chunk);
      Unit& room = sh.ring[team][unit % STAGES];
      const u32 to = smem_address(&room[mate_row][mate_col]);
      const u16* const cache = unit / HALVES % 2 ? p.value_cache : p.key_cache;
#pragma unroll AT_A_TIME
      for (int n = 0; n < UNIT; n += COPIED) {
        const int at = half * UNIT + n + mate_row;  // of the span's keys
        const int key = (stream + (chunk + at / CHUNK) * LANES) * CHUNK + at % CHUNK;
        const int slot = __shfl_sync(~0u, places, chunk % WINDOW * 2 + at / PLACED) + at % PLACED;
        const u16* from = cache + ((i64)slot * NUM_KV + kv_head) * HEAD + mate_col;
        if (key < fresh || key >= context) copy_or_zero(to + n * PITCH * 2, from, key < context);
      }
    }
    copy_commit();
  };
  // Adds the new keys or values to a unit, few if any: the context's last ones. Keys are rotated, and
  // written to their slots with their values.
  const auto add_new = [&](int unit) {
#if ROTATE
    if (unit >= num_units || unit / (2 * HALVES) < fresh_span) return;
    const int chunk = unit / (2 * HALVES) * SPAN, half = unit % HALVES;
    const bool is_value = unit / HALVES % 2;
    Unit& room = sh.ring[team][unit % STAGES];
    const int unit_low = (stream + chunk * LANES) * CHUNK + half * UNIT;
    const int unit_high = unit_low + (HALVES == 1 ? (SPAN - 1) * LANES * CHUNK + CHUNK : UNIT);
    const int new_low = max(unit_low, fresh), new_high = min(unit_high, context);
    const int items = (new_high - new_low) * (is_value ? PIECES : HALF);
    for (int i = mate; i < items; i += 32 * TEAM) {
      const int key = new_low + i / (is_value ? PIECES : HALF);
      if (key / CHUNK % LANES != stream) continue;  // another lane's, between two chunks of the span
      const int n = key / CHUNK / LANES % SPAN * CHUNK + (key - half * UNIT) % CHUNK;
      const i64 row = first + key - fresh;
      if (is_value) {
        const int col = i % PIECES * 8;
        *(uint4*)&room[n][col] = *(const uint4*)(p.v + row * p.v_stride + kv_head * HEAD + col);
        continue;
      }
      const int pair = i % HALF;
      const i64 slot = p.slots[row];
      const u16* from = p.k + row * p.k_stride + kv_head * HEAD + pair;
      const u32 value = *(const u32*)(p.v + row * p.v_stride + kv_head * HEAD + 2 * pair);
      const u32 turned = rotated_pair(from[0], from[HALF], p.cosines[(i64)key * HALF + pair],
                                      p.sines[(i64)key * HALF + pair]);
      room[n][pair] = (u16)turned;
      room[n][pair + HALF] = (u16)(turned >> 16);
      if (slot >= 0) {
        const i64 at = (slot * NUM_KV + kv_head) * HEAD;
        p.key_cache[at + pair] = (u16)turned;
        p.key_cache[at + pair + HALF] = (u16)(turned >> 16);
        *(u32*)(p.value_cache + at + 2 * pair) = value;
      }
    }
#endif
  };

  if (BEGINS) {
#pragma unroll 1
    for (int unit = 0; unit < BEGUN; unit++) fetch_old(unit);
    return;
  }
  for (int m0 = 0; m0 < num_queries; m0 += QUERIES) {
    const int count = min(QUERIES, num_queries - m0);
    if (num_chunks > WINDOW * LANES) places = places_from(0);
    float2 turns[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int m = (i * THREADS + thread) / HALF, pair = (i * THREADS + thread) % HALF;
      turns[i] = make_float2(0.f, 0.f);
      // rows of a sequence follow each other; what lies past the context is no row that counts
      const i64 turn = (i64)min(first_position + (m0 + m) / RATIO, context - 1) * HALF + pair;
      if (ROTATE && m < count) turns[i] = make_float2(p.cosines[turn], p.sines[turn]);
    }
#pragma unroll 1
    for (int unit = 0; unit < BEGUN && !has_begun; unit++) fetch_old(unit);
    has_begun = false;
#if ROTATE
    // nothing so far was written by kernels that may still run
    if (m0 == 0) wait_for_rows();
#endif
    u32 pairs[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int m = (i * THREADS + thread) / HALF, pair = (i * THREADS + thread) % HALF;
      pairs[i] = 0;
      if (m < count) {
        const i64 row = first + (m0 + m) / RATIO;
        const u16* from = p.q + row * p.q_stride + (kv_head * RATIO + (m0 + m) % RATIO) * HEAD + pair;
        pairs[i] = from[0] | (u32)from[HALF] << 16;
      }
    }
#pragma unroll 1
    for (int unit = 0; unit < BEGUN; unit++) add_new(unit);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int m = (i * THREADS + thread) / HALF, pair = (i * THREADS + thread) % HALF;
      u32 turned = pairs[i];
      if (ROTATE) turned = rotated_pair(turned & 0xFFFF, turned >> 16, turns[i].x, turns[i].y);
      if (m >= MOST_QUERIES) break;
      sh.queries[m][pair] = (u16)turned;
      sh.queries[m][pair + HALF] = (u16)(turned >> 16);
    }
    int last_keys[2];  // that this thread's two queries see
#pragma unroll
    for (int half = 0; half < QUERY_HALVES; half++) {
      const int m = tile * 16 + half * 8 + g;
      last_keys[half] = m < count ? first_position + (m0 + m) / RATIO : -1;
    }
    meet_unit();

    Partial part = {};
    part.tops[0] = part.tops[1] = -INFINITE;
    // rows of operands: those of queries that cannot be are others', and nobody reads what comes of them
    const int a_row = min(tile * 16 + (lane & 15), MOST_QUERIES - 1), a_col = (lane >> 4) * 8;
    const u32 queries = smem_address(&sh.queries[a_row][a_col]);
    const int key_row = (lane & 7) + (lane >> 4) * 8, key_col = (lane >> 3 & 1) * 8;

    const int num_halves = count > 8 ? QUERY_HALVES : 1;  // that have queries
    // scores of 16 keys
    const auto score = [&](float (&low)[4], float (&high)[4], u32 keys) {
#pragma unroll
      for (int i = 0; i < 4; i++) low[i] = high[i] = 0.f;
#pragma unroll
      for (int step = 0; step < HEAD / 16; step++) {
        u32 a[4], b[4];
        load_matrices(a, queries + step * 32);
        load_matrices(b, keys + step * 32);
        mma_bf16(low, a, b[0], b[1]);
        mma_bf16(high, a, b[2], b[3]);
      }
    };
    // of keys from `low` on, this thread's that its query sees: i where i <= limit
    const auto limit_of = [&](int low, int half) { return last_keys[half] - low - 2 * t; };
    // Scales the scores of keys `at` and at + 1; the higher one.
    const auto scale_scores = [&](float (&some)[4], int at, int limit, int half) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& score = some[half * 2 + i];
        score = at + i <= limit ? __fmul_rn(score, factor) : -INFINITE;
      }
      return fmaxf(some[half * 2], some[half * 2 + 1]);
    };
    const auto top_of_query = [](float top) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    };
    const auto safe = [](float top) { return top == -INFINITE ? 0.f : top; };
    // Takes the top of a chunk into the running one; what earlier chunks have added shrinks.
    const auto raise_top = [&](int half, float top) {
      top = fmaxf(part.tops[half], top);
      const float shrink = exp2_of(part.tops[half] - safe(top));
      part.tops[half] = top;
      return shrink;
    };
    const auto shrink_part = [&](int half, float shrink) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        part.sums[half * 2 + i] = __fmul_rn(part.sums[half * 2 + i], shrink);
#pragma unroll
        for (int col = 0; col < COLS / 8; col++)
          part.total[col][half * 2 + i] = __fmul_rn(part.total[col][half * 2 + i], shrink);
      }
    };
    // The weights of two keys.
    const auto weigh = [&](const float (&some)[4], int half, float top) {
      return pack_bf16(exp2_of(some[half * 2] - safe(top)), exp2_of(some[half * 2 + 1] - safe(top)));
    };
    // 16 weighted values
    const auto add = [&](const u32 (&a)[4], u32 values) {
#if COLS == 8
      u32 b[2];
      load_transposed(b, values);
      mma_bf16(part.total[0], a, b[0], b[1]);
#else
#pragma unroll
      for (int col = 0; col < COLS / 16; col++) {
        u32 b[4];
        load_transposed(b, values + col * 32);
        mma_bf16(part.total[col * 2], a, b[0], b[1]);
        mma_bf16(part.total[col * 2 + 1], a, b[2], b[3]);
      }
#endif
      mma_bf16(part.sums, a, ONES, ONES);
    };
    // Once all warps of the team are done with a unit.
    const auto refill = [&](int unit) {
      fetch_old(unit + STAGES);
      add_new(unit + STAGES);
    };
    const auto keys_of = [&](int unit, int key) {
      return smem_address(&sh.ring[team][unit % STAGES][key + key_row][key_col]);
    };
    const auto values_of = [&](int unit, int key) {
      return smem_address(
          &sh.ring[team][unit % STAGES][key + (lane & 15)][share * COLS + (COLS > 8) * (lane >> 4) * 8]);
    };

#if SHARES == 1
    float scores[CHUNK / 8][4];
    u32 weights[CHUNK / 8][2] = {};
    const u32 at_keys = smem_address(&sh.ring[team][0][key_row][key_col]);
    const u32 at_values = smem_address(&sh.ring[team][0][lane & 15][(lane >> 4) * 8]);
#pragma unroll 1
    for (int unit = 0; unit < num_units; unit++) {
      copy_wait<STAGES - 2>();
      meet_team(first_barrier + team);
      refill(unit - 1);
      const u32 room = unit % STAGES * sizeof(Unit);
      switch (unit % 4) {
        case 0: score(scores[0], scores[1], at_keys + room); break;
        case 1:
          score(scores[2], scores[3], at_keys + room);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            if (half == num_halves) break;
            const int limit = limit_of((stream + unit / 4 * LANES) * CHUNK, half);
            float top = -INFINITE;
#pragma unroll
            for (int i = 0; i < CHUNK / 8; i++)
              top = fmaxf(top, scale_scores(scores[i], i * 8, limit, half));
            shrink_part(half, raise_top(half, top_of_query(top)));
#pragma unroll
            for (int i = 0; i < CHUNK / 8; i++) weights[i][half] = weigh(scores[i], half, part.tops[half]);
          }
          break;
        case 2:
          add({weights[0][0], weights[0][1], weights[1][0], weights[1][1]}, at_values + room);
          break;
        default:
          add({weights[2][0], weights[2][1], weights[3][0], weights[3][1]}, at_values + room);
      }
    }
#else
    // A span: warps score 16 keys each; when the tops are known they weigh them; then all take all weights.
    const bool has_keys = share * 16 < UNIT;
#pragma unroll 1
    for (int unit = 0; unit < num_units; unit += 2) {
      const int chunk = unit / 2 * SPAN;
      if (unit) copy_wait<STAGES - 2>();
      else copy_wait<STAGES - 1>();
      meet_team(first_barrier + team);
      if (unit) refill(unit - 1);
      float scores[2][4];
      if (has_keys) {
        score(scores[0], scores[1], keys_of(unit, share * 16));
        const int low = (stream + (chunk + share / 2) * LANES) * CHUNK + share % 2 * 16;
#pragma unroll
        for (int half = 0; half < QUERY_HALVES; half++) {
          if (half == num_halves) break;
          const int m = tile * 16 + half * 8 + g, limit = limit_of(low, half);
          const float top = top_of_query(
              fmaxf(scale_scores(scores[0], 0, limit, half), scale_scores(scores[1], 8, limit, half)));
          if (t == 0 && m < MOST_QUERIES) sh.unit_tops[team][m][share] = top;
        }
      }
      meet_team(first_barrier + team);
      refill(unit);
      float shrinks[SPAN][QUERY_HALVES];
#pragma unroll
      for (int half = 0; half < QUERY_HALVES; half++) {
        if (half == num_halves) break;
        const int m = min(tile * 16 + half * 8 + g, MOST_QUERIES - 1);
        float top = 0.f;  // of the chunk that this warp weighs
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
          if (chunk + i >= num_mine) break;
          const float2 tops = *(const float2*)&sh.unit_tops[team][m][i * 2];
          shrinks[i][half] = raise_top(half, fmaxf(tops.x, tops.y));
          if (i == share / 2) top = part.tops[half];
        }
        if (has_keys && m == tile * 16 + half * 8 + g) {
#pragma unroll
          for (int i = 0; i < 2; i++)
            *(u32*)&sh.weights[team][m][share * 16 + i * 8 + 2 * t] = weigh(scores[i], half, top);
        }
      }
      copy_wait<STAGES - 1>();
      meet_team(first_barrier + team);
#pragma unroll
      for (int i = 0; i < SPAN; i++) {
        if (chunk + i >= num_mine) break;
#pragma unroll
        for (int half = 0; half < QUERY_HALVES; half++) {
          if (half < num_halves) shrink_part(half, shrinks[i][half]);
        }
#pragma unroll
        for (int n = 0; n < CHUNK; n += 16) {
          u32 a[4];
          load_matrices(a, smem_address(&sh.weights[team][a_row][i * CHUNK + n + a_col]));
          add(a, values_of(unit + 1, i * CHUNK + n));
        }
      }
    }
#endif
    finish(part, m0, count, first);
  }
}
