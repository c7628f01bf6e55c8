// A warp's weights: tiles of columns as they lie in memory.
//
// They come straight to registers while the tile before is multiplied or, where that keeps too few bytes under way
// (AHEAD), to shared memory, and from there to registers when their turn comes. There each lane keeps what it copied
// itself: no lane reads another's bytes, so that nothing but the lane's own copies is waited for.

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

// What shared memory keeps of a warp's tile: 16 bytes a lane of each piece, and as many of scales and offsets.
#define KEPT_BYTES ((2 * PIECES + (BITS > 0)) * 512)
#define PLANE_WORDS (GROUP == 128 ? 2 : 1)  // of a lane, which needs all of a word or half of it

#if AHEAD && BITS
DEVICE void take_plane(ScalesOfTile& plane, const Lane& l, const u32* words) {
#pragma unroll
  for (int i = 0; i < PLANE_WORDS; i++) {
#if GROUP == 32
    plane[i] = words[i];
#else
    plane[i] = words[i] >> 16 * ((GROUP == 64 ? l.lane : l.g) % 2) & 0xFFFF;
#endif
  }
}
#endif

#define LOOKAHEAD (AHEAD ? AHEAD : 1)  // tiles between the one that is multiplied and the one that is asked for

// A warp's tiles in order, from block of rows to block of rows: where this lane asks for the next one.
struct Stream {
  const u8* base;
  const u8* rest;
  int to_scales;  // from base; a third pointer is more than the registers hold
#if AHEAD
  u32 room;   // where this lane finds the tile that is multiplied
  u32 rooms;  // the sum of the addresses of two: room = rooms - room is the other one
#endif

  DEVICE void seek(const Problem& p, const Lane& l, int row_tile, int column) {
    const size_t tile = (size_t)row_tile * p.num_col_tiles + column;
    base = p.base + tile * BASE_BYTES + l.lane * 16;
    rest = p.rest + tile * REST_BYTES + l.lane * 16;
#if BITS
    int at = GROUP == 32 ? l.lane * 4 : (GROUP == 64 ? l.lane : l.g) * 2;
    if (AHEAD) at = at / 4 * 4;  // whole words
    to_scales = scale_at(0, 0, 0) + at - l.lane * 16;
#endif
  }

  DEVICE void skip() {
    base += BASE_BYTES, rest += REST_BYTES;
#if AHEAD == 2
    room = rooms - room;
#endif
  }

  // Piece i of half h.
  DEVICE const u8* piece(int h, int i) const {
#if BITS == 0
    return base + dense_at(h, i);
#else
    return i == 0 ? base + nibbles_at(h) : rest + (i == 1 ? nibbles_at(h) : bytes_at(h, i - 2));
#endif
  }

#if AHEAD
  // A half of the next tile, and with the first one its scales, on its way to where the lane has read the tile that is
  // multiplied; nothing if it is not there.
  DEVICE void ask_for_half(Raw&, bool is_there, int h) const {
    if (is_there) {
#pragma unroll
      for (int i = 0; i < PIECES; i++) copy16(room + (h * PIECES + i) * 512, piece(h, i));
#if BITS
      if (h == 0) {
#pragma unroll
        for (int i = 0; i < PLANE_WORDS * (1 + OFFSET); i++) {
          const int which = i / PLANE_WORDS, word = i % PLANE_WORDS;
          copy4(room + 2 * PIECES * 512 + i * 4,
                base + to_scales + which * (GROUPS_PER_TILE * 32) + word * 16);
        }
      }
#endif
    }
    copy_commit();
  }

  // A half of the tile that is multiplied now.
  DEVICE void take_half(Raw& raw, const Lane& l, int h) const {
    copy_wait<2 * AHEAD - 1>();
#pragma unroll
    for (int i = 0; i < PIECES; i++) raw.pieces[h][i] = load_shared4(room + (h * PIECES + i) * 512);
#if BITS
    if (h == 0) {
      const uint4 cell = load_shared4(room + 2 * PIECES * 512);
      const u32 words[4] = {cell.x, cell.y, cell.z, cell.w};
      take_plane(raw.scales, l, words);
#if OFFSET
      take_plane(raw.offsets, l, words + PLANE_WORDS);
#endif
    }
#endif
  }

  DEVICE void ask_for_scales(Raw&, bool) const {}  // they come with the first half
#else
  DEVICE void ask_for_half(Raw& raw, bool is_there, int h) const {
    if (!is_there) return;
#pragma unroll
    for (int i = 0; i < PIECES; i++) raw.pieces[h][i] = load_once(piece(h, i));
  }

  DEVICE void ask_for_scales(Raw& raw, bool is_there) const {
#if BITS
    if (!is_there) return;
    load_plane(raw.scales, base + to_scales);
#if OFFSET
    load_plane(raw.offsets, base + to_scales + GROUPS_PER_TILE * 32);
#endif
#endif
  }

  DEVICE void take_half(Raw&, const Lane&, int) const {}  // they are there
#endif
};
