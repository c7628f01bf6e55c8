// The weights of a warp, on their way into shared memory of its own (persistent.cu).

#pragma once
#include "layers.cuh"

// How a warp's copies go on, in shared memory: needed once a panel.
struct Feed {
  int panels;  // from the one that is copied to the end, of which every stride-th is this warp's
  int count;   // tiles of each
  int jump;    // tiles from the end of one to the beginning of the next
  int layer, linear;
};

extern __shared__ __align__(128) u8 shared[];
__shared__ Feed feeds[ALL_WARPS];

// A value that all lanes hold, in a way that says so. What they read it from may be written afterwards.
DEVICE int same(int value) {
  __syncwarp();
  return __shfl_sync(~0u, value, 0);
}

// What follows from which warp this is.
struct Own {
  int range, team;      // of the columns, of all teams of the GPU
  u32 slots, barriers;  // shared addresses of its ring
  Feed* feed;

  DEVICE Own() {
    const int warp = same(this_thread() / 32);
    range = warp % RANGES, team = warp / RANGES * gridDim.x + this_block();
    slots = smem_address(shared) + warp * (SLOTS * SLOT_BYTES);
    barriers = smem_address(shared) + BARRIERS_AT + warp * (SLOTS * 8);
    feed = &feeds[warp];
  }

  DEVICE static int stride() { return TEAMS * gridDim.x; }
};

// The weights of a warp's range, of all its panels, linears and layers, one after the other.
struct Ring {
  const u8 *base, *rest;  // the next tile to copy
  int left;               // tiles of its panel
  int slot;               // the next one to read
  u32 parity;

  // The next linear of which this warp has tiles.
  DEVICE void find_tiles(const Step& s, const Own& own) {
    int layer = same(own.feed->layer), linear = same(own.feed->linear);
    left = 0;
    while (layer < NUM_LAYERS && left == 0) {
      const int2 tiles = tiles_of(linear, own.range);
      const int columns = COUNT_OF(columns_of(linear)), panels = panels_of(linear) - own.team;
      if (panels > 0 && tiles.y) {
        const size_t at = (size_t)own.team * columns + tiles.x;
        base = s.layers[layer].base[linear] + at * BASE_BYTES;
        rest = s.layers[layer].rest[linear] + at * REST_BYTES;
        left = tiles.y;
        own.feed->panels = panels, own.feed->count = left;
        own.feed->jump = Own::stride() * columns - left;
      }
      if (++linear == LINEARS) linear = 0, layer++;
    }
    own.feed->layer = layer, own.feed->linear = linear;
    __syncwarp();
  }

  DEVICE void fetch(const Step& s, const Own& own, int to) {
    if (left == 0) return;
    const int n = min(SLOT_TILES, left);
    const u32 at = own.slots + to * SLOT_BYTES;
    bulk_load_by_warp(at, base, n * BASE_BYTES, at + SLOT_TILES * BASE_BYTES, rest, n * REST_BYTES,
                      own.barriers + to * 8, evict_first_policy());
    base += n * BASE_BYTES, rest += n * REST_BYTES;
    left -= n;
    if (left) return;
    const int panels = same(own.feed->panels) - Own::stride();
    if (panels > 0) {
      const int jump = same(own.feed->jump);
      base += (size_t)jump * BASE_BYTES, rest += (size_t)jump * REST_BYTES;
      left = same(own.feed->count);
      own.feed->panels = panels;
      __syncwarp();
    } else {
      find_tiles(s, own);
    }
  }

  DEVICE void wait(const Own& own) const { barrier_wait(own.barriers + slot * 8, parity); }

  // The slot has been read: fetches into it, and goes on to the next.
  DEVICE void advance(const Step& s, const Own& own) {
    __syncwarp();
    fetch(s, own, slot);
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
