// out [tokens, rows] = x [tokens, columns] times packed weights, transposed, for several tiles of tokens (Hopper).
//
// The columns are cut into 8 ranges, whose sums are added in order, and a warp loads the weights of a range from
// memory straight into the registers that the tensor cores read, DEPTH tiles ahead, as in direct.cu. But more
// warps than one read the x of a range:
//
//   TEAMS of a block have panels of RT tiles of 16 rows each, so that there are warps enough to hide what each of
//   them waits for, and x lies in shared memory once for all.
//   SPLIT blocks of a cluster have RANGES / SPLIT ranges each, so that there is room for x of many tokens, and each
//   byte of it goes to one block of a cluster only. A block adds its ranges' sums to the total that the block before
//   it hands on; the last one stores.
//
// x arrives in pieces of a few tiles of columns, boxes that the copy engine swizzles. Where there is a slot for each
// it stays; else slots are rings: when all teams have read a piece, one of them in turn fetches another into its
// place. Weights do not depend on earlier kernels, so the first LEAD tiles of them are on their way before those
// have ended.
//
// x has no more than TOKENS rows. Compile-time parameters (tile.cuh and product.cuh have the others), of which none
// changes a sum: RT, DEPTH, LEAD, TEAMS, SPLIT, SUM_BUFFERS and INBOXES (1 or 2) a team.

#define SWIZZLED 1
#include "product.cuh"

#define SIZE (RANGES / SPLIT)  // ranges of a block, warps of a team
#define TEAM_THREADS (SIZE * 32)
#define THREADS (TEAMS * TEAM_THREADS)
#define BOXES (ACT / 8)  // of a tile of columns
#define BOX_BYTES (TOKENS * 128)  // that a box has room for

struct Problem {
  const u8* meta;  // [groups][pitch] {float scale, int sum}
  const u8* base;  // [row tiles][column tiles][BASE_BYTES]
  const u8* rest;  // [row tiles][column tiles][REST_BYTES]
  const u8* bias;
  u8* out;
  int num_tokens, num_rows, num_row_tiles, num_col_tiles;
  int pitch;
  int num_panels;
  int piece;      // tiles of columns that a slot of x holds
  int num_slots;  // of a range
  int keeps_x;    // there is a slot for every piece
  int bias_kind;  // 0 none, 1 bf16, 2 float32
  int out_is_float;
};

// What this warp is: a range of the cluster's, of a team of the block.
struct Place {
  int rank, cluster, num_clusters;
  int range, team;

  DEVICE explicit Place(const Problem& p) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be the same in all lanes
    rank = blockIdx.x % SPLIT, cluster = blockIdx.x / SPLIT, num_clusters = gridDim.x / SPLIT;
    range = rank * SIZE + warp % SIZE, team = warp / SIZE;
  }

  // Panels that all teams take in a round, and the first of a team: the last ones, where not all teams have one, go
  // to different clusters.
  DEVICE int stride() const { return num_clusters * TEAMS; }
  DEVICE int first_panel(int of_team) const { return of_team * num_clusters + cluster; }
};

// ---- x -------------------------------------------------------------------------------------------

// The slots of a range, which a warp reads one after the other. `index` counts pieces, of all rounds.
struct Window {
  u32 x, meta;      // shared addresses
  u32 full, empty;  // barriers of the slots
  int first, count;  // tiles of columns
  int num_pieces;    // of a round
  int total;         // pieces that are fetched: of all rounds, unless x stays
  int index, at, slot, parity;

  // A piece of the range into a slot; columns that do not exist arrive as zeros, tokens may be anything.
  DEVICE void fetch(const Problem& p, const TensorMap* map, int to, int piece) const {
    while (piece >= num_pieces) piece -= num_pieces;  // of the next round
    const int done = piece * p.piece, tiles = min(p.piece, count - done);
    if (is_elected()) {
      const u32 barrier = full + to * 8;
      barrier_expect(barrier, tiles * (BOXES * 128 * p.num_tokens + META_TILE));
#pragma unroll 1
      for (int i = 0; i < tiles; i++) {
        const int tile = first + done + i, room = to * p.piece + i;
#pragma unroll
        for (int box = 0; box < BOXES; box++) {
          tensor_load(x + (room * BOXES + box) * BOX_BYTES, map, tile * TILE_COLS + box * (TILE_COLS / BOXES), 0,
                      barrier);
        }
#if ACT == 8
#pragma unroll
        for (int group = 0; group < ACT_GROUPS; group++) {
          const size_t row = (size_t)(tile * ACT_GROUPS + group) * p.pitch;
          bulk_load(meta + room * META_TILE + group * (TOKENS * 8), p.meta + row * 8, TOKENS * 8, barrier);
        }
#endif
      }
    }
    __syncwarp();
  }

  // Waits for the piece and says where it lies.
  DEVICE Activations look(const Problem& p, const Lane& l) const {
    barrier_wait(full + slot * 8, parity);
    __syncwarp();
    Activations here;
    here.even = x + slot * p.piece * (BOXES * BOX_BYTES) + l.lane % 8 * 128 + ((l.lane / 8) ^ (l.lane % 8)) * 16;
    here.meta = meta + slot * p.piece * META_TILE + 2 * l.t * 8;
    return here;
  }

  DEVICE int tiles(const Problem& p) const { return min(p.piece, count - at * p.piece); }

  // The piece has been read: on to the next, which may be the first again.
  DEVICE void advance(const Problem& p, const TensorMap* map, const Place& place, int lane) {
    if (!p.keeps_x) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + slot * 8);
      // the slot of the piece before: the other teams have most likely left it
      const int next = index - 1 + p.num_slots;
      if (index > 0 && next < total && next % TEAMS == place.team) {
        const int old = (slot ? slot : p.num_slots) - 1;
        barrier_wait(empty + old * 8, slot ? parity : parity ^ 1);
        fetch(p, map, old, at - 1 + p.num_slots);
      }
    }
    index++, slot++;
    if (++at == num_pieces) {
      at = 0;
      if (p.keeps_x) slot = 0;
    }
    if (slot == p.num_slots) slot = 0, parity ^= !p.keeps_x;
  }
};

// ---- sums ----------------------------------------------------------------------------------------

// Sums lie as they do in registers: of a tile of rows and a tile of tokens, the four of every lane. A thread adds up
// WIDTH of them at a time, so that all of a team have something to do.
#define SUMS_OF_RANGE (RT * NT * 32 * 16)  // bytes
#define SHARE (SUMS_OF_RANGE / 4 / TEAM_THREADS)
#define WIDTH (SHARE >= 4 ? 4 : SHARE >= 2 ? 2 : 1)

// What a team adds up, in shared memory: a buffer of sums [range][RT][NT][lane][4] or two; inboxes, where the block
// before this leaves totals [RT][NT][lane][4], with barriers that count them; and barriers by which the block behind
// says that it has read its own.
struct Desk {
  u32 sums, inbox, arrived, read;
  int round;

  DEVICE u32 own_sums() const { return sums + round % SUM_BUFFERS * (SIZE * SUMS_OF_RANGE); }
  DEVICE int turn() const { return round % INBOXES; }
  DEVICE u32 parity() const { return round / INBOXES % 2; }

  DEVICE void meet(const Place& place) const {
    if (SIZE == 1) __syncwarp();
    else meet_at<TEAM_THREADS>(1 + place.team);
  }

  // The block before may use the inbox of round `of` again, if it ever will.
  DEVICE void has_read(const Problem& p, const Place& place, int panel, int of) const {
    if (panel + (INBOXES - round + of) * place.stride() >= p.num_panels) return;
    barrier_release_remote(remote_address(read + of % INBOXES * 8, place.rank - 1));
  }

  DEVICE void add_up(const Problem& p, const Place& place, int panel) const {
    const bool is_first = SPLIT == 1 || place.rank == 0, is_last = place.rank == SPLIT - 1;
    const u32 box = turn() * SUMS_OF_RANGE;
    u32 to = 0, their_barrier = 0;
    if (!is_first) barrier_wait_cluster(arrived + turn() * 8, parity());
    if (!is_last) {
      to = remote_address(inbox + box, place.rank + 1);
      their_barrier = remote_address(arrived + turn() * 8, place.rank + 1);
      if (round >= INBOXES) barrier_wait_cluster(read + turn() * 8, parity() ^ 1);
    }
#pragma unroll 1
    for (u32 at = threadIdx.x % TEAM_THREADS * (WIDTH * 4); at < SUMS_OF_RANGE; at += TEAM_THREADS * (WIDTH * 4)) {
      float sum[WIDTH], more[WIDTH];
      load_floats(sum, own_sums() + at);
      if (!is_first) {
        load_floats(more, inbox + box + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum[i] = more[i] + sum[i];
      }
#pragma unroll
      for (int range = 1; range < SIZE; range++) {
        load_floats(more, own_sums() + range * SUMS_OF_RANGE + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum[i] += more[i];
      }
      if (is_last) store(p, place, panel, at / 4, sum);
      else store_remote(to + at, sum, their_barrier);
    }
  }

  // The sums from number `at` on, of a panel's.
  DEVICE void store(const Problem& p, const Place& place, int panel, int at, const float (&sum)[WIDTH]) const {
    const int lane = at / 4 % 32, fragment = at / 128;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const int of_four = at % 4 + i;
      const int row = panel * ROWS + fragment / NT * TILE_ROWS + lane / 4 + of_four / 2 * 8;
      const int token = fragment % NT * 8 + lane % 4 * 2 + of_four % 2;
      if (row >= p.num_rows || token >= p.num_tokens) continue;
      const size_t to = (size_t)token * p.num_rows + row;
      const float value = sum[i] + bias_of(p, row);
      if (p.out_is_float) ((float*)p.out)[to] = value;
      else ((u16*)p.out)[to] = float_to_bf16(value);
    }
  }

  // This warp's sums of a panel, and the team's, are added up and stored or handed on.
  DEVICE void finish(const Problem& p, const Place& place, const Lane& l, const Accumulators& acc, int panel) {
    const bool is_elder = threadIdx.x % TEAM_THREADS == 0;
    if (SPLIT > 1 && place.rank && is_elder) {
      barrier_expect(arrived + turn() * 8, SUMS_OF_RANGE);
    }
    const u32 to = own_sums() + place.range % SIZE * SUMS_OF_RANGE + l.lane * 16;
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int n = 0; n < NT; n++) store_shared4(to + (r * NT + n) * 512, acc[r][n]);
    meet(place);
    // all of the team have read what came before
    if (SUM_BUFFERS == 2 && SPLIT > 1 && place.rank && is_elder && round) {
      has_read(p, place, panel, round - 1);
    }
    add_up(p, place, panel);
    if (SUM_BUFFERS == 1) {
      meet(place);
      if (SPLIT > 1 && place.rank && is_elder) has_read(p, place, panel, round);
    }
    round++;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    split(const __grid_constant__ TensorMap map, const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) u8 shared[];
  launch_dependents();
  const Lane l = my_lane();
  const Place place(p);

  Window window;
  Desk desk;
  {
    const int tiles = SIZE * p.num_slots * p.piece, own = place.range % SIZE * p.num_slots;
    const u32 all_x = smem_address(shared), all_meta = all_x + tiles * (BOXES * BOX_BYTES);
    const u32 all_sums = all_meta + tiles * META_TILE;
    const u32 inboxes = all_sums + TEAMS * SUM_BUFFERS * SIZE * SUMS_OF_RANGE;
    const u32 barriers = inboxes + (SPLIT > 1 ? TEAMS * INBOXES * SUMS_OF_RANGE : 0);
    window.x = all_x + own * p.piece * (BOXES * BOX_BYTES), window.meta = all_meta + own * p.piece * META_TILE;
    window.full = barriers + own * 8, window.empty = window.full + SIZE * p.num_slots * 8;
    desk.sums = all_sums + place.team * SUM_BUFFERS * SIZE * SUMS_OF_RANGE;
    desk.inbox = inboxes + place.team * INBOXES * SUMS_OF_RANGE;
    desk.arrived = barriers + 2 * SIZE * p.num_slots * 8 + place.team * INBOXES * 8;
    desk.read = desk.arrived + TEAMS * INBOXES * 8;
    desk.round = 0;
  }
  window.first = p.num_col_tiles * place.range / RANGES;
  const int count = p.num_col_tiles * (place.range + 1) / RANGES - window.first;
  window.count = count;
  window.num_pieces = (count + p.piece - 1) / p.piece;
  const int rounds = (p.num_panels - place.first_panel(0) + place.stride() - 1) / place.stride();
  window.total = window.num_pieces * (p.keeps_x ? 1 : rounds);
  window.index = window.at = window.slot = window.parity = 0;

  // the sequence of tiles: those of the range, for every panel
  Stream next[RT];
  int next_panel = place.first_panel(place.team), next_left = 0;
  bool has_next;
  auto start_panel = [&]() {
    has_next = count && next_panel < p.num_panels;
    if (!has_next) return;
    next_left = count;
#pragma unroll
    for (int r = 0; r < RT; r++) {
      // a row of tiles beyond the matrix computes the last one's again, and stores nothing
      const int row_tile = min(next_panel * RT + r, p.num_row_tiles - 1);
      const size_t tile = (size_t)row_tile * p.num_col_tiles + window.first;
      next[r].base = p.base + tile * BASE_BYTES + l.lane * 16;
      next[r].rest = p.rest + tile * REST_BYTES + l.lane * 16;
    }
  };
  auto go_on = [&]() {
#pragma unroll
    for (int r = 0; r < RT; r++) next[r].base += BASE_BYTES, next[r].rest += REST_BYTES;
    if (--next_left == 0) {
      next_panel += place.stride();
      start_panel();
    }
  };
  Weights w[DEPTH][RT];
  auto load = [&](int d) {
    if (!has_next) return;
    reload(w[d], next, l, 0, true);
    reload(w[d], next, l, 1, true);
    go_on();
  };
  // before the loads, which a fence might wait for
  if (place.team == 0) {
    for (int i = l.lane; i < p.num_slots; i += 32) {
      barrier_init(window.full + i * 8, 1);
      barrier_init(window.empty + i * 8, TEAMS);
    }
  }
  if (SPLIT > 1 && place.range % SIZE == 0 && l.lane < INBOXES) {
    barrier_init(desk.arrived + l.lane * 8, 1);
    barrier_init(desk.read + l.lane * 8, 1);
  }
  publish_barriers();
  start_panel();
#pragma unroll
  for (int d = 0; d < LEAD; d++) load(d);

  __syncthreads();
#if SPLIT > 1
  cluster_arrive();
#endif
  wait_for_earlier_kernels();
  for (int i = place.team; i < min(p.num_slots, window.total); i += TEAMS) window.fetch(p, &map, i, i);
#pragma unroll
  for (int d = LEAD; d < DEPTH; d++) load(d);
#if SPLIT > 1
  cluster_wait();  // the others run, and their barriers are known
#endif

  int panel = place.first_panel(place.team);
  Accumulators acc = {};
  auto finish = [&]() {
    desk.finish(p, place, l, acc, panel);
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;
    panel += place.stride();
  };
  if (count == 0) {
    while (panel < p.num_panels) finish();
  } else if (panel < p.num_panels) {
    Activations x = window.look(p, l);
    int left = window.tiles(p);  // of the piece
    while (panel < p.num_panels) {
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        multiply_tile(acc, l, w[d], x, next, has_next);
        if (has_next) go_on();
        x.even += BOXES * BOX_BYTES, x.meta += META_TILE;
        if (--left) continue;
        window.advance(p, &map, place, l.lane);
        if (window.at == 0) {
          finish();
          if (panel >= p.num_panels) break;
        }
        x = window.look(p, l);
        left = window.tiles(p);
      }
    }
  }
  // a team without a panel in the last round reads along, so that what others need is fetched
  while (!p.keeps_x && window.index < window.total) {
    window.look(p, l);
    window.advance(p, &map, place, l.lane);
  }
}
