// What stands for kernels/cuda/ptx.cuh on a CPU: the same functions, without instructions of a GPU.
//
// Products of matrices round once for each instruction, from exact sums; a GPU may round in between.

#pragma once
#include "host.h"

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define HAS_BULK_COPY (__CUDA_ARCH__ >= 900)

// ---- shared memory -------------------------------------------------------------------------------
//
// An address is the distance from the block's first byte; in another block of the cluster also its rank.
// What a kernel declares with its size counts from STATICS_AT on, by its distance from another variable.

constexpr u32 RANK_AT = 24;          // bits
constexpr u32 STATICS_AT = 3 << 22;  // past all of the dynamic

inline u8* shared_at(Block& block, u32 at, u32 bytes) {
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

inline u8* shared_at(u32 at, u32 bytes) { return shared_at(*this_emulated_block, at, bytes); }

inline u32 address_of(const void* p, size_t bytes) {
  Block& block = *this_emulated_block;
  const size_t at = (const u8*)p - block.shared;
  if (at < block.shared_bytes) return (u32)at;
  const ptrdiff_t from_others = (const u8*)p - block.statics;
  if (std::abs(from_others) > STATICS_AT / 4) fail("a pointer outside of shared memory");
  block.static_sizes[(u32)(STATICS_AT + from_others)] = bytes;
  return (u32)(STATICS_AT + from_others);
}

template <class T>
inline u32 smem_address(const T& object) {
  if constexpr (std::is_array_v<T>) return address_of(object, sizeof object);
  else if constexpr (std::is_pointer_v<T>) return address_of(object, sizeof *object);
  else return address_of((const u8*)object, 1);
}

template <class T>
inline T shared_value(u32 at) {
  T value;
  memcpy(&value, shared_at(at, sizeof value), sizeof value);
  return value;
}

DEVICE uint2 load_shared2(u32 at) { return shared_value<uint2>(at); }
DEVICE uint4 load_shared4(u32 at) { return shared_value<uint4>(at); }
DEVICE u32 load_shared_u16(u32 at) { return shared_value<u16>(at); }
DEVICE float load_shared(u32 at) { return shared_value<float>(at); }

template <int COUNT>
inline void load_floats(float (&v)[COUNT], u32 at) {
  memcpy(v, shared_at(at, sizeof v), sizeof v);
}

template <class T>
inline void set_shared(u32 at, T value) {
  memcpy(shared_at(at, sizeof value), &value, sizeof value);
}

DEVICE void store_shared(u32 at, float value) { set_shared(at, value); }
DEVICE void store_shared(u32 at, float a, float b) { set_shared(at, make_float2(a, b)); }
DEVICE void store_shared2(u32 at, uint2 v) { set_shared(at, v); }
DEVICE void store_shared4(u32 at, uint4 v) { set_shared(at, v); }
DEVICE void store_shared4(u32 at, const float (&v)[4]) {
  set_shared(at, make_float4(v[0], v[1], v[2], v[3]));
}
DEVICE void zero_shared4(u32 at) { set_shared(at, uint4{}); }

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

DEVICE void load_matrices(u32 (&b)[4], u32 at) { matrices<4, false>(b, at); }
DEVICE void load_transposed(u32 (&b)[4], u32 at) { matrices<4, true>(b, at); }
DEVICE void load_transposed(u32 (&b)[2], u32 at) { matrices<2, true>(b, at); }

DEVICE void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
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

// ---- memory --------------------------------------------------------------------------------------

DEVICE uint4 load_once(const void* from) { return *(const uint4*)from; }
DEVICE u32 load_once_u32(const void* from) { return *(const u32*)from; }
DEVICE u32 load_once_u16(const void* from) { return *(const u16*)from; }
DEVICE void prefetch_line(const void*) {}

DEVICE u32 computed_once(u32 value) { return value; }

// Arrives now, or not before it is waited for.
template <class T>
inline void copy_later(u32 to, const T& value) {
  u8* const there = shared_at(to, sizeof value);
  const auto copy = [=]() { memcpy(there, &value, sizeof value); };
  if (this_emulated_block->draw() % 2) copy();
  else this_fiber->copies.push_back(copy);
}

DEVICE void copy_or_zero(u32 to, const void* from, bool is_inside) {
  copy_later(to, is_inside ? *(const uint4*)from : uint4{});
}
DEVICE void copy16(u32 to, const void* from) { copy_or_zero(to, from, true); }
DEVICE void copy4(u32 to, const void* from) {
  if ((size_t)from % 4) fail("a copy from an address that is not aligned");
  copy_later(to, *(const u32*)from);
}

DEVICE void copy_commit() {
  this_fiber->groups.push_back(std::move(this_fiber->copies));
  this_fiber->copies.clear();
}

template <int N>
DEVICE void copy_wait() {
  auto& groups = this_fiber->groups;
  while (groups.size() > N) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

// Others may see it, and go on, before this thread does.
DEVICE void store_release(u32* to, u32 value) {
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
  std::this_thread::yield();
  look_again();
}

DEVICE u32 load_acquire(const u32* from) {
  look_again();
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

DEVICE u32 add_and_order(u32* to, u32 value) { return atomicAdd(to, value); }

DEVICE void store_relaxed(void* to, u32 value) { __atomic_store_n((u32*)to, value, __ATOMIC_RELEASE); }

DEVICE void store_relaxed(void* to, uint2 v) {
  __atomic_store_n((u64*)to, v.x | (u64)v.y << 32, __ATOMIC_RELEASE);
}

DEVICE void store_relaxed_halves(void* to, uint4 v) {
  store_relaxed(to, make_uint2(v.x, v.y));
  store_relaxed((u64*)to + 1, make_uint2(v.z, v.w));
}

DEVICE void store_relaxed_words(void* to, uint4 v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; i++) store_relaxed((u32*)to + i, words[i]);
}

DEVICE u32 load_relaxed(const void* from) {
  look_again();
  return __atomic_load_n((const u32*)from, __ATOMIC_ACQUIRE);
}

DEVICE uint2 load_relaxed_pair(const void* from) {
  look_again();
  const u64 pair = __atomic_load_n((const u64*)from, __ATOMIC_ACQUIRE);
  return make_uint2((u32)pair, (u32)(pair >> 32));
}

DEVICE uint4 load_relaxed_halves(const void* from) {
  const uint2 low = load_relaxed_pair(from), high = load_relaxed_pair((const u64*)from + 1);
  return make_uint4(low.x, low.y, high.x, high.y);
}

DEVICE uint4 load_relaxed_words(const void* from) {
  const u32* const at = (const u32*)from;
  const u32 x = load_relaxed(at), y = load_relaxed(at + 1), z = load_relaxed(at + 2);
  return make_uint4(x, y, z, load_relaxed(at + 3));
}

DEVICE int this_thread() { return threadIdx.x; }
DEVICE int this_block() { return blockIdx.x; }

// ---- numbers -------------------------------------------------------------------------------------

DEVICE float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

DEVICE u32 float_to_bf16(float f) {
  if (f != f) return 0x7FFF;
  const u32 bits = __float_as_uint(f);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

DEVICE u32 pack_bf16(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }

DEVICE float half_to_float(u32 bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

DEVICE float exp2_of(float x) { return exp2f(x); }

// The low and the high bf16 of a register, each by itself.
template <class Both>
inline u32 by_pairs(const Both& both) {
  return float_to_bf16(both(0)) | float_to_bf16(both(16)) << 16;
}

inline float half_of(u32 pair, int shift) { return bf16_to_float(pair >> shift & 0xFFFF); }

DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {  // exact in double, where 8 bits meet 8 bits
  return by_pairs([&](int i) { return (float)((double)half_of(a, i) * half_of(b, i) + half_of(c, i)); });
}

DEVICE u32 sub_pair(u32 a, u32 b) {
  return by_pairs([&](int i) { return half_of(a, i) - half_of(b, i); });
}

DEVICE u32 is_positive_pair(u32 a) {
  return by_pairs([&](int i) { return half_of(a, i) > 0 ? 1.f : 0.f; });
}

DEVICE u32 mask_or(u32 a, u32 mask, u32 bits) { return (a & mask) | bits; }

DEVICE u32 mask_xor(u32 a, u32 mask, u32 bits) { return (a & mask) ^ bits; }

DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = a | (u64)b << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 which = selector >> 4 * i & 15;
    u32 byte = bytes >> 8 * (which & 7) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// ---- tensor cores --------------------------------------------------------------------------------

// What one instruction adds to a sum.
template <class Sum, class Value, int COLUMNS>
inline Sum added(Sum sum, const Value (&left)[COLUMNS], const Value (&right)[COLUMNS]) {
  Value product = 0;
  for (int k = 0; k < COLUMNS; k++) product += left[k] * right[k];
  return (Sum)(sum + product);
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

DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product<double, 2>(d, a, b0, b1, d, [](u32 bits, bool) { return bf16_to_float(bits & 0xFFFF); });
}

DEVICE void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product<int, 4>(d, a, b0, b1, d,
                  [](u32 bits, bool is_left) { return is_left ? (int)(u8)bits : (int)(signed char)bits; });
}

DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product<int, 4>(d, a, b0, b1, d, [](u32 bits, bool) { return (int)(signed char)bits; });
}

// ---- kernels that overlap ------------------------------------------------------------------------

DEVICE void launch_dependents() {}
DEVICE void wait_for_earlier_kernels() {}

// ---- barriers in shared memory, the copy engine, clusters ------------------------------------------

// Does something with a barrier of a block of the cluster.
template <class Do>
inline auto with_barrier(Block& block, u32 at, const Do& what) {
  std::lock_guard<std::mutex> lock(block.barriers_mutex);
  return what(block.barriers[at]);
}

DEVICE void barrier_init(u32 bar, u32 arrivals) {
  shared_at(bar, 8);
  with_barrier(*this_emulated_block, bar, [=](Barrier& barrier) {
    barrier = Barrier();
    barrier.arrivals = barrier.missing = (int)arrivals;
  });
}

DEVICE void publish_barriers() {}
DEVICE void publish_to_copies() {}

DEVICE void barrier_expect(u32 bar, u32 bytes) {
  const bool was_missing = with_barrier(*this_emulated_block, bar, [=](Barrier& barrier) {
    if (barrier.missing == 0) return false;
    barrier.missing--;
    barrier.bytes += bytes;
    barrier.settle();
    return true;
  });
  if (!was_missing) fail("an arrival at a barrier that awaits none");
}

DEVICE void barrier_wait(u32 bar, u32 parity) {
  const auto has_ended = [=](Barrier& barrier) {
    barrier.is_awaited = (u32)barrier.phase % 2 == parity;
    return !barrier.is_awaited;
  };
  while (!with_barrier(*this_emulated_block, bar, has_ended)) look_again();
}

DEVICE u64 evict_first_policy() { return 0; }

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

DEVICE void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 bar, u32 blocks) {
  if (bytes % 16 || (size_t)from % 16) fail("a bulk copy of less than whole 16 bytes");
  copy_to_blocks(to, bytes, bar, blocks, [=](u8* there) { memcpy(there, from, bytes); });
}

DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64 = 0) {
  bulk_load_multicast(to, from, bytes, bar, 1u << this_emulated_block->rank);
}

// What helpers_emulated.tensor_map writes.
struct alignas(64) TensorMap {
  const u8* from;
  u64 num_rows, num_cols, row_bytes;      // of the matrix
  u64 value_bytes, box_rows, rest[10];    // of a box, whose rows have 128 bytes
};

DEVICE void tensor_load_multicast(u32 to, const TensorMap* map, int x, int y, u32 bar, u32 blocks) {
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

DEVICE void tensor_load(u32 to, const TensorMap* map, int x, int y, u32 bar) {
  tensor_load_multicast(to, map, x, y, bar, 1u << this_emulated_block->rank);
}

DEVICE void prefetch_map(const TensorMap*) {}

DEVICE bool is_elected() { return this_fiber->thread % 32 == 0; }

DEVICE void bulk_load_by_warp(u32 to, const void* from, u32 bytes, u32 to_more, const void* from_more,
                              u32 more, u32 bar, u64) {
  if (!is_elected()) return;
  barrier_expect(bar, bytes + more);
  bulk_load(to, from, bytes, bar);
  if (more) bulk_load(to_more, from_more, more, bar);
}

// All threads of the cluster, in two halves.
DEVICE void cluster_arrive() { ++*this_emulated_block->cluster_arrivals; }
DEVICE void cluster_arrive_release() { cluster_arrive(); }

DEVICE void cluster_wait() {
  const Block& block = *this_emulated_block;
  const int all = block.launch->num_threads * (int)block.cluster->size();
  const int wanted = ++this_fiber->cluster_phase * all;
  while (*block.cluster_arrivals < wanted) look_again();
}

DEVICE u32 remote_address(u32 at, u32 rank) { return at | (rank + 1) << RANK_AT; }

inline Block& block_at(u32 at) { return *this_emulated_block->cluster->at((at >> RANK_AT) - 1); }
inline u32 place_at(u32 at) { return at & ((1u << RANK_AT) - 1); }

DEVICE float load_remote(u32 at) {
  float value;
  memcpy(&value, shared_at(block_at(at), place_at(at), sizeof value), sizeof value);
  return value;
}

DEVICE void store_remote(u32 at, const float (&v)[4]) {
  memcpy(shared_at(block_at(at), place_at(at), sizeof v), v, sizeof v);
}

template <int COUNT>
inline void store_remote(u32 to, const float (&v)[COUNT], u32 bar) {
  Block* const block = &block_at(to);
  if (&block_at(bar) != block) fail("a barrier in another block than what it counts");
  u8* const there = shared_at(*block, place_at(to), sizeof v);
  const u32 barrier_there = place_at(bar);
  std::vector<float> values(v, v + COUNT);
  const auto arrive = [=]() {
    memcpy(there, values.data(), COUNT * 4);
    with_barrier(*block, barrier_there, [=](Barrier& barrier) {
      barrier.bytes -= COUNT * 4;
      barrier.settle();
    });
  };
  const bool is_late = this_emulated_block->draw() % 2;
  this_emulated_block->bulk_copies.push_back({arrive, block, barrier_there, is_late});
}

DEVICE void barrier_arrive_remote(u32 bar) {
  const bool was_missing = with_barrier(block_at(bar), place_at(bar), [](Barrier& barrier) {
    if (barrier.missing == 0) return false;
    barrier.missing--;
    barrier.settle();
    return true;
  });
  if (!was_missing) fail("an arrival at a barrier that awaits none");
}

DEVICE void barrier_release_remote(u32 bar) { barrier_arrive_remote(bar); }

DEVICE void barrier_wait_cluster(u32 bar, u32 parity) { barrier_wait(bar, parity); }

DEVICE void barrier_arrive(u32 bar) {
  barrier_arrive_remote(remote_address(bar, (u32)this_emulated_block->rank));
}
