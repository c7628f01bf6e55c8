// A warp's weights, from memory straight to registers: a tile of columns as it lies in memory, loaded while the
// tile before it is multiplied.

#pragma once
#include "wide_work.cuh"

#if BITS == 0 || BITS == 16
#define PIECES 4  // of 16 bytes, a lane and half tile
#else
#define PIECES (BITS / 4)
#endif

#if GROUP == 128
typedef u32 ScalesOfTile[2];  // of rows g and g + 8
#else
typedef u32 ScalesOfTile[1];  // of 16 rows and all groups, spread over the warp's lanes
#endif

// A tile as it lies in memory: a lane's pieces of both halves, its rows' scales and offsets.
struct Raw {
  uint4 pieces[2][PIECES];
#if BITS
  ScalesOfTile scales;
#if OFFSET
  ScalesOfTile offsets;
#endif
#endif
};

#if BITS
// The scale, or offset, of this lane's row g or g + 8.
DEVICE u32 spread(const Lane& l, const ScalesOfTile& plane, int group, int upper) {
#if GROUP == 128
  return plane[upper];
#else
  return from_lane_of(l.g, upper, group, plane[0]);
#endif
}

DEVICE void load_plane(ScalesOfTile& plane, const u8* from) {
#if GROUP == 128
  plane[0] = load_once_u16(from), plane[1] = load_once_u16(from + 16);
#elif GROUP == 64
  plane[0] = load_once_u16(from);
#else
  plane[0] = load_once_u32(from);
#endif
}
#endif

// A warp's tiles in order, from block of rows to block of rows: where this lane reads the next one.
struct Stream {
  const u8* base;
  const u8* rest;
  int to_scales;  // from base; a third pointer is more than the registers hold

  DEVICE Stream(const Problem& p, const Lane& l, int row_tile, int column) {
    const size_t tile = (size_t)row_tile * p.num_col_tiles + column;
    base = p.base + tile * BASE_BYTES + l.lane * 16;
    rest = p.rest + tile * REST_BYTES + l.lane * 16;
#if BITS
    const int at = GROUP == 32 ? l.lane * 4 : (GROUP == 64 ? l.lane : l.g) * 2;
    to_scales = scale_at(0, 0, 0) + at - l.lane * 16;
#endif
  }

  DEVICE void load_half(Raw& raw, bool is_there, int h) const {
    if (!is_there) return;
#if BITS == 0
#pragma unroll
    for (int i = 0; i < 4; i++) raw.pieces[h][i] = load_once(base + dense_at(h, i));
#else
    raw.pieces[h][0] = load_once(base + nibbles_at(h));
#if BITS >= 8
    raw.pieces[h][1] = load_once(rest + nibbles_at(h));
#endif
#if BITS == 16
    raw.pieces[h][2] = load_once(rest + bytes_at(h, 0));
    raw.pieces[h][3] = load_once(rest + bytes_at(h, 1));
#endif
#endif
  }

  DEVICE void load_scales(Raw& raw, bool is_there) const {
#if BITS
    if (!is_there) return;
    load_plane(raw.scales, base + to_scales);
#if OFFSET
    load_plane(raw.offsets, base + to_scales + GROUPS_PER_TILE * 32);
#endif
#endif
  }

  DEVICE void skip() { base += BASE_BYTES, rest += REST_BYTES; }
};
