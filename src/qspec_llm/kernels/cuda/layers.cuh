// What the kernel of all layers (persistent.cu) is given, and which of its warps does what.

#pragma once
#include "attention.cuh"
#include "product.cuh"
#include "stamped.cuh"

#define ALL_WARPS 16
#define ALL_THREADS (32 * ALL_WARPS)
#define TEAMS 2        // of a block
#define MOST_PIECES 2  // that a thread asks for at a time
#define QUERY (NUM_HEADS * HEAD)
#define QKV (QUERY + 2 * NUM_KV * HEAD)
#define SLOT_BYTES (SLOT_TILES * (BASE_BYTES + REST_BYTES))
#define COUNT_OF(columns) (((columns) + TILE_COLS - 1) / TILE_COLS)
#define WIDER(a, b) ((a) > (b) ? (a) : (b))
#define WIDEST WIDER(WIDER(HIDDEN, QUERY), INNER)
#define LINE 128  // bytes of a line of the L2

// Where things lie in shared memory: the rings of weights first, at the end the lanes of attention.
#define BARRIERS_AT (ALL_WARPS * SLOTS * SLOT_BYTES)
#define SUMS_AT (BARRIERS_AT + ALL_WARPS * SLOTS * 8)
#define ROW_AT (SUMS_AT + 2 * TEAMS * RANGES * SUM_BYTES)                // after two buffers of sums a team
#define LANES_AT ((ROW_AT + COUNT_OF(WIDEST) * (X_TILE + META_TILE) + 15) / 16 * 16)  // after a linear's input

// A row as pieces: pairs of 4 codes, then {scale, sum} of every group; or words.
#if ACT == 8
#define VALUES_OF(columns) ((columns) / 8)
#define PIECES_OF(columns) (VALUES_OF(columns) + (columns) / ACT_GROUP)
#else
#define VALUES_OF(columns) ((columns) / 4)
#define PIECES_OF(columns) VALUES_OF(columns)
#endif

DEVICE uint4 load_piece(const uint4* from) { return ACT == 8 ? load_pairs(from) : load_words(from); }

DEVICE bool is_piece_of(const uint4& v, u32 stamp) {
  return ACT == 8 ? are_pairs_of(v, stamp) : are_words_of(v, stamp);
}

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
  u16* x;  // [HIDDEN], the residual stream before and after
  // what blocks hand to each other (stamped.cuh)
  u32 *after_attention, *after_mlp;  // [HIDDEN] words, the residual stream
  u32* qkv;                          // [QKV] words
  u32* gate_up;                      // [2 INNER] words
  uint4 *attended, *inner;           // pieces of a row (PIECES_OF)
  uint2* lanes;                      // [heads][LANES][HEAD] pairs, of attention
  uint4* lane_stats;                 // [heads][LANES] pairs of {top, sum}
  u32* counts;                       // {the last stamp, blocks that are done}
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
