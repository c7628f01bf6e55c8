// ptx.cuh, what of it no macro of a kernel changes.

#include "ptx.cuh"

u8* shared_at(Block& block, u32 at, u32 bytes) {
  if (at % min(bytes, 16u)) fail("an address of shared memory that is not aligned");
  if (at >= STATICS_AT / 2) {
    const auto behind = block.static_sizes.upper_bound(at);
    const bool is_first = behind == block.static_sizes.begin();
    if (is_first || at + bytes > std::prev(behind)->first + std::prev(behind)->second)
      fail("an address outside of shared memory");
    return block.statics + ((ptrdiff_t)at - STATICS_AT);
  }
  if (at + bytes > block.shared_bytes) fail("an address outside of shared memory");
  return block.shared + at;
}

u32 address_of(const void* p, size_t bytes) {
  Block& block = *this_emulated_block;
  const size_t at = (const u8*)p - block.shared;
  if (at < block.shared_bytes) return (u32)at;
  const ptrdiff_t from_others = (const u8*)p - block.statics;
  if (std::abs(from_others) > STATICS_AT / 4) fail("a pointer outside of shared memory");
  block.static_sizes[(u32)(STATICS_AT + from_others)] = bytes;
  return (u32)(STATICS_AT + from_others);
}

// 8x8 matrices of 16-bit values: lane l of a warp gets two of row l / 4, or of column l / 4.
template <int COUNT, bool IS_TRANSPOSED>
inline void matrices(u32 (&b)[COUNT], u32 at) {
  this_fiber->operands[0] = at;
  by_warp([](Fiber** lanes) {
    for (int m = 0; m < COUNT; m++) {
      for (int l = 0; l < 32; l++) {
        u32 both = 0;
        for (int i = 0; i < 2; i++) {
          const int near = l % 4 * 2 + i, far = l / 4;
          const int row = IS_TRANSPOSED ? near : far, col = IS_TRANSPOSED ? far : near;
          u16 value;
          memcpy(&value, shared_at((u32)lanes[m * 8 + row]->operands[0], 16) + col * 2, 2);
          both |= (u32)value << 16 * i;
        }
        lanes[l]->operands[1 + m] = both;
      }
    }
  });
  for (int m = 0; m < COUNT; m++) b[m] = (u32)this_fiber->operands[1 + m];
}

void load_matrices(u32 (&b)[4], u32 at) { matrices<4, false>(b, at); }

void load_transposed(u32 (&b)[4], u32 at) { matrices<4, true>(b, at); }

void load_transposed(u32 (&b)[2], u32 at) { matrices<2, true>(b, at); }

void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  u64* const operands = this_fiber->operands;
  operands[0] = at, operands[1] = a, operands[2] = b, operands[3] = c, operands[4] = d;
  by_warp([](Fiber** lanes) {
    for (int i = 0; i < 4 * 8 * 8; i++) {
      const int matrix = i / 64, row = i / 8 % 8, col = i % 8;
      const u32 both = (u32)lanes[row * 4 + col / 2]->operands[1 + matrix];
      const u16 value = (u16)(both >> col % 2 * 16);
      memcpy(shared_at((u32)lanes[matrix * 8 + col]->operands[0], 16) + row * 2, &value, 2);
    }
  });
}

// Arrives now, or not before it is waited for.
void copy_or_zero(u32 to, const void* from, bool is_inside) {
  const uint4 value = is_inside ? *(const uint4*)from : uint4{};
  u8* const there = shared_at(to, sizeof value);
  const auto copy = [=]() { memcpy(there, &value, sizeof value); };
  if (this_emulated_block->draw() % 2) copy();
  else this_fiber->copies.push_back(copy);
}

void copy_commit() {
  this_fiber->groups.push_back(std::move(this_fiber->copies));
  this_fiber->copies.clear();
}

void wait_for_copies(size_t most_left) {
  auto& groups = this_fiber->groups;
  while (groups.size() > most_left) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

// d = a b + c for 16 x 8 of d, COLUMNS of a: a lane's registers hold PACKED values each.
template <class Value, int PACKED, class Sum, class Of>
inline void product(Sum (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const Sum (&c)[4], const Of& of) {
  constexpr int COLUMNS = PACKED * 8;
  for (int i = 0; i < 4; i++) {
    this_fiber->operands[i] = a[i];
    this_fiber->operands[6 + i] = bits_of<u32>(c[i]);
  }
  this_fiber->operands[4] = b0, this_fiber->operands[5] = b1;
  by_warp([&](Fiber** lanes) {
    Value left[16][COLUMNS], right[8][COLUMNS];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < PACKED; i++) {
        for (int r = 0; r < 4; r++)
          left[g + r % 2 * 8][t * PACKED + i + r / 2 * COLUMNS / 2] =
              (Value)of((u32)lanes[l]->operands[r] >> i * (32 / PACKED), true);
        for (int r = 0; r < 2; r++)
          right[g][t * PACKED + i + r * COLUMNS / 2] =
              (Value)of((u32)lanes[l]->operands[4 + r] >> i * (32 / PACKED), false);
      }
    }
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) {
        const int row = l / 4 + i / 2 * 8, col = l % 4 * 2 + i % 2;
        const Sum before = bits_of<Sum>((u32)lanes[l]->operands[6 + i]);
        lanes[l]->operands[10 + i] = bits_of<u32>(added(before, left[row], right[col]));
      }
    }
  });
  for (int i = 0; i < 4; i++) d[i] = bits_of<Sum>((u32)this_fiber->operands[10 + i]);
}

void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product<double, 2>(d, a, b0, b1, d, [](u32 bits, bool) { return bf16_to_float(bits & 0xFFFF); });
}

void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product<int, 4>(d, a, b0, b1, d,
                  [](u32 bits, bool is_left) { return is_left ? (int)(u8)bits : (int)(signed char)bits; });
}

void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product<int, 4>(d, a, b0, b1, d, [](u32 bits, bool) { return (int)(signed char)bits; });
}

// Does something with a barrier of a block of the cluster.
template <class Do>
inline auto with_barrier(Block& block, u32 at, const Do& what) {
  std::lock_guard<std::mutex> lock(block.barriers_mutex);
  return what(block.barriers[at]);
}

void barrier_init(u32 bar, u32 arrivals) {
  shared_at(bar, 8);
  with_barrier(*this_emulated_block, bar, [=](Barrier& barrier) {
    barrier = Barrier();
    barrier.arrivals = barrier.missing = (int)arrivals;
  });
}

void barrier_expect(u32 bar, u32 bytes) {
  const bool was_missing = with_barrier(*this_emulated_block, bar, [=](Barrier& barrier) {
    if (barrier.missing == 0) return false;
    barrier.missing--;
    barrier.bytes += bytes;
    barrier.settle();
    return true;
  });
  if (!was_missing) fail("an arrival at a barrier that awaits none");
}

void barrier_wait(u32 bar, u32 parity) {
  const auto has_ended = [=](Barrier& barrier) {
    barrier.is_awaited = (u32)barrier.phase % 2 == parity;
    return !barrier.is_awaited;
  };
  while (!with_barrier(*this_emulated_block, bar, has_ended)) look_again();
}

// Copies that `write` makes, into all blocks of the cluster that have a bit in `blocks`.
template <class Write>
inline void copy_to_blocks(u32 to, u32 bytes, u32 bar, u32 blocks, const Write& write) {
  const std::vector<Block*>& cluster = *this_emulated_block->cluster;
  for (size_t rank = 0; rank < cluster.size(); rank++) {
    if (!(blocks >> rank & 1)) continue;
    Block* const block = cluster[rank];
    u8* const there = shared_at(*block, to, 16);
    if (to + bytes > block->shared_bytes) fail("a bulk copy past the end of shared memory");
    if (block == this_emulated_block) {  // others are not to be looked into from here
      for (const auto& [warp, products] : block->products)
        if (products.may_read(to, to + bytes)) fail("a bulk copy to where products may still read");
    }
    const auto arrive = [=]() {
      write(there);
      with_barrier(*block, bar, [=](Barrier& barrier) {
        if (barrier.arrivals == 0) block->launch->fail("a copy that no barrier counts");
        barrier.bytes -= bytes;
        barrier.settle();
      });
    };
    const bool is_late = this_emulated_block->draw() % 2;
    this_emulated_block->bulk_copies.push_back({arrive, block, bar, is_late});
  }
}

void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 bar, u32 blocks) {
  if (bytes % 16 || (size_t)from % 16) fail("a bulk copy of less than whole 16 bytes");
  copy_to_blocks(to, bytes, bar, blocks, [=](u8* there) { memcpy(there, from, bytes); });
}

void tensor_load_multicast(u32 to, const TensorMap* map, int x, int y, u32 bar, u32 blocks) {
  const u32 bytes = (u32)map->box_rows * 128;
  if (to % 1024) fail("a swizzled box that does not begin at a multiple of 1024 bytes");
  const TensorMap m = *map;
  copy_to_blocks(to, bytes, bar, blocks, [=](u8* there) {
    for (u32 at = 0; at < bytes; at += m.value_bytes) {
      const u64 row = y + at / 128, col = x + at % 128 / m.value_bytes;
      u8* const value = there + (at ^ at / 128 % 8 * 16);
      if (row < m.num_rows && col < m.num_cols)
        memcpy(value, m.from + row * m.row_bytes + col * m.value_bytes, m.value_bytes);
      else
        memset(value, 0, m.value_bytes);
    }
  });
}

void cluster_arrive() { ++*this_emulated_block->cluster_arrivals; }

void cluster_wait() {
  const Block& block = *this_emulated_block;
  const int all = block.launch->num_threads * (int)block.cluster->size();
  const int wanted = ++this_fiber->cluster_phase * all;
  while (*block.cluster_arrivals < wanted) look_again();
}

inline Block& block_at(u32 at) { return *this_emulated_block->cluster->at((at >> RANK_AT) - 1); }
inline u32 place_at(u32 at) { return at & ((1u << RANK_AT) - 1); }


float load_remote(u32 at) {
  float value;
  memcpy(&value, shared_at(block_at(at), place_at(at), sizeof value), sizeof value);
  return value;
}

void store_remote(u32 at, const float (&v)[4]) {
  memcpy(shared_at(block_at(at), place_at(at), sizeof v), v, sizeof v);
}

void store_remote(u32 to, const float* v, int count, u32 bar) {
  Block* const block = &block_at(to);
  if (&block_at(bar) != block) fail("a barrier in another block than what it counts");
  u8* const there = shared_at(*block, place_at(to), count * 4);
  const u32 barrier_there = place_at(bar);
  std::vector<float> values(v, v + count);
  const auto arrive = [=]() {
    memcpy(there, values.data(), count * 4);
    with_barrier(*block, barrier_there, [=](Barrier& barrier) {
      barrier.bytes -= count * 4;
      barrier.settle();
    });
  };
  const bool is_late = this_emulated_block->draw() % 2;
  this_emulated_block->bulk_copies.push_back({arrive, block, barrier_there, is_late});
}

void barrier_arrive_remote(u32 bar) {
  const bool was_missing = with_barrier(block_at(bar), place_at(bar), [](Barrier& barrier) {
    if (barrier.missing == 0) return false;
    barrier.missing--;
    barrier.settle();
    return true;
  });
  if (!was_missing) fail("an arrival at a barrier that awaits none");
}
