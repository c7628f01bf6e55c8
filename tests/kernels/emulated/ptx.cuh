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

u8* shared_at(Block& block, u32 at, u32 bytes);

inline u8* shared_at(u32 at, u32 bytes) { return shared_at(*this_emulated_block, at, bytes); }

u32 address_of(const void* p, size_t bytes);

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

void load_matrices(u32 (&b)[4], u32 at);
void load_transposed(u32 (&b)[4], u32 at);
void load_transposed(u32 (&b)[2], u32 at);

void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d);

// ---- memory --------------------------------------------------------------------------------------

DEVICE uint4 load_once(const void* from) { return *(const uint4*)from; }
DEVICE u32 load_once_u32(const void* from) { return *(const u32*)from; }
DEVICE u32 load_once_u16(const void* from) { return *(const u16*)from; }
DEVICE void prefetch_line(const void*) {}

DEVICE u32 computed_once(u32 value) { return value; }

// Arrives now, or not before it is waited for.
void copy_or_zero(u32 to, const void* from, bool is_inside);
DEVICE void copy16(u32 to, const void* from) { copy_or_zero(to, from, true); }

void copy_commit();

void wait_for_copies(size_t most_left);

template <int N>
DEVICE void copy_wait() { wait_for_copies(N); }

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

void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

// ---- kernels that overlap ------------------------------------------------------------------------

DEVICE void launch_dependents() {}
DEVICE void wait_for_earlier_kernels() {}

// ---- barriers in shared memory, the copy engine, clusters ------------------------------------------

void barrier_init(u32 bar, u32 arrivals);

DEVICE void publish_barriers() {}
DEVICE void publish_to_copies() {}

void barrier_expect(u32 bar, u32 bytes);

void barrier_wait(u32 bar, u32 parity);

DEVICE u64 evict_first_policy() { return 0; }

void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 bar, u32 blocks);

DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64 = 0) {
  bulk_load_multicast(to, from, bytes, bar, 1u << this_emulated_block->rank);
}

// What helpers_emulated.tensor_map writes.
struct alignas(64) TensorMap {
  const u8* from;
  u64 num_rows, num_cols, row_bytes;      // of the matrix
  u64 value_bytes, box_rows, rest[10];    // of a box, whose rows have 128 bytes
};

void tensor_load_multicast(u32 to, const TensorMap* map, int x, int y, u32 bar, u32 blocks);

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
void cluster_arrive();
DEVICE void cluster_arrive_release() { cluster_arrive(); }

void cluster_wait();

DEVICE u32 remote_address(u32 at, u32 rank) { return at | (rank + 1) << RANK_AT; }

float load_remote(u32 at);

void store_remote(u32 at, const float (&v)[4]);

void store_remote(u32 to, const float* v, int count, u32 bar);

template <int COUNT>
inline void store_remote(u32 to, const float (&v)[COUNT], u32 bar) { store_remote(to, v, COUNT, bar); }

void barrier_arrive_remote(u32 bar);

DEVICE void barrier_release_remote(u32 bar) { barrier_arrive_remote(bar); }

DEVICE void barrier_wait_cluster(u32 bar, u32 parity) { barrier_wait(bar, parity); }

DEVICE void barrier_arrive(u32 bar) {
  barrier_arrive_remote(remote_address(bar, (u32)this_emulated_block->rank));
}
