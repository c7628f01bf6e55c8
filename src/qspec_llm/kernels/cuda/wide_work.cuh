// What wide.cu computes, and which thread block computes which ranges of which rows (parameters as there).

#pragma once
#include "tile.cuh"

#define TOKENS (NT * 8)
#if ACT == 8
#define X_BYTES (TOKENS * 128)  // of a tile of columns
#define ACT_GROUPS (TILE_COLS / ACT_GROUP)
#define META_BYTES (ACT_GROUPS * TOKENS * 8)
#define SUBGROUP (GROUP < ACT_GROUP ? GROUP : ACT_GROUP)
#else
#define X_BYTES (TOKENS * 256)
#define META_BYTES 0
#endif
#define WARPS (WGS * 4)
#define THREADS (WARPS * 32)
#define MAX_STAGES 32
#define ITEMS (THREADS * NT)  // groups of four sums in a block's range
#define ROLLS (BITS == 16 && NT > 8)  // products stay in flight from tile to tile

struct Problem {
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  float4* parts;  // [token block, row block][RANGES][ITEMS]
  u32* arrivals;  // [token block, row block]: ranges whose sums are there, RANGES more every time
  u32* flags;     // [token block, row block][WARPS]: a total waits for the next thread block
  int num_tokens, num_rows, num_row_tiles, num_col_tiles, num_row_blocks;
  int pitch, num_stages;
  int units, num_longer;  // of thread blocks
  int passes;     // shared rows: totals pass from thread block to thread block
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

DEVICE int range_start(const Problem& p, int range) {
  return (u32)p.num_col_tiles * (u32)range / RANGES;
}

// The first unit of thread block i, and the thread block of a unit: the first `num_longer` have one
// unit more than the others.
DEVICE int first_unit(const Problem& p, int i) { return p.units * i + min(i, p.num_longer); }

DEVICE int owner_of(const Problem& p, int unit) {
  const int behind = unit - (p.units + 1) * p.num_longer;
  return behind < 0 ? unit / (p.units + 1) : p.num_longer + behind / p.units;
}

// Where the sums of a block of rows lie in the workspace, counted in blocks of rows.
DEVICE int place_of(const Problem& p, int block) {
  return blockIdx.y * p.num_row_blocks + block;
}

// Ranges [first, last) of a block of rows.
struct Share {
  int block, first, last;
};

DEVICE Share share_of(int begin, int end, int block) {
  return {block, max(begin - block * RANGES, 0), min(end - block * RANGES, RANGES)};
}

struct Lane {
  int lane, g, t, warp;
};

DEVICE Lane lane_of(int thread) {
  Lane l;
  l.lane = thread % 32, l.g = l.lane / 4, l.t = l.lane % 4, l.warp = thread / 32;
  return l;
}

typedef float Accumulators[NT][4];

DEVICE void clear(Accumulators& acc) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
}
