// Instructions that CUDA C++ has no words for, one function each.
//
// Shared memory is addressed by 32-bit addresses (`smem_address`). Barriers are mbarriers: a phase
// ends when its arrivals and its bytes are complete; waiting names the parity of the phase.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if __CUDA_ARCH__ >= 900
#define HAS_BULK_COPY 1  // copy engine, clusters, programmatic dependent launch
#else
#define HAS_BULK_COPY 0
#endif

struct __align__(64) TensorMap {
  u64 words[16];
};

#define DEVICE __device__ __forceinline__

DEVICE u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- shared memory -------------------------------------------------------------------------------

DEVICE uint2 load_shared2(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}

DEVICE uint4 load_shared4(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

DEVICE u32 load_shared_u16(u32 at) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}

DEVICE float load_shared(u32 at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}

DEVICE void load_floats(float (&v)[1], u32 at) { v[0] = load_shared(at); }

DEVICE void load_floats(float (&v)[2], u32 at) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(at));
}

DEVICE void load_floats(float (&v)[4], u32 at) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(at));
}

DEVICE void store_shared(u32 at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}

DEVICE void store_shared(u32 at, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}

DEVICE void store_shared2(u32 at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}

DEVICE void store_shared4(u32 at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

DEVICE void store_shared4(u32 at, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

DEVICE void zero_shared4(u32 at) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}

// Four 8x8 matrices of 16-bit values, stored transposed; lane l gives the address where column l % 8 of
// matrix l / 8 begins.
DEVICE void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&b)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(at));
}

// The same, each transposed; lane l gives the address of row l % 8 of matrix l / 8 as it lies.
DEVICE void load_transposed(u32 (&b)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(at));
}

DEVICE void load_transposed(u32 (&b)[2], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(at));
}

// ---- memory --------------------------------------------------------------------------------------

// 16 bytes that are read once: they pass by the L1.
DEVICE uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

DEVICE u32 load_once_u32(const void* from) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

DEVICE u32 load_once_u16(const void* from) {
  u16 v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
}

// Asynchronous copies of 16 bytes into shared memory, in groups.
DEVICE void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Zeros instead, where the source is not inside.
DEVICE void copy_or_zero(u32 to, const void* from, bool is_inside) {
  const u32 bytes = is_inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A line of memory on its way to the L2.
DEVICE void prefetch_line(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// Waits for as many threads of the block, by one of its 16 barriers.
template <int THREADS_THAT_MEET>
DEVICE void meet_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS_THAT_MEET) : "memory");
}

// The same value, of which the compiler knows no more: it is not computed anew where it is used.
DEVICE u32 computed_once(u32 value) {
  u32 same;
  asm volatile("mov.u32 %0, %1;" : "=r"(same) : "r"(value));
  return same;
}

// This thread and block, read anew: what is computed from them need not stay in registers until the next time.
DEVICE int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

DEVICE int this_block() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// ---- memory that other blocks read and write meanwhile -----------------------------------------------
//
// What is stored or loaded as one u32 or one half of 8 bytes is whole; nothing else is ordered.

DEVICE void store_relaxed(void* to, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

DEVICE void store_relaxed(void* to, uint2 v) {
  asm volatile("{ .reg .b64 p; mov.b64 p, {%1, %2}; st.relaxed.gpu.global.b64 [%0], p; }" ::"l"(to),
               "r"(v.x), "r"(v.y)
               : "memory");
}

// 16 bytes, each half whole.
DEVICE void store_relaxed_halves(void* to, uint4 v) {
  asm volatile(
      "{ .reg .b64 p, q; mov.b64 p, {%1, %2}; mov.b64 q, {%3, %4};\n"
      "st.relaxed.gpu.global.v2.b64 [%0], {p, q}; }" ::"l"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

// 16 bytes, each word whole.
DEVICE void store_relaxed_words(void* to, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

DEVICE u32 load_relaxed(const void* from) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

DEVICE uint2 load_relaxed_pair(const void* from) {
  uint2 v;
  asm volatile("{ .reg .b64 p; ld.relaxed.gpu.global.b64 p, [%2]; mov.b64 {%0, %1}, p; }"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from)
               : "memory");
  return v;
}

DEVICE uint4 load_relaxed_halves(const void* from) {
  uint4 v;
  asm volatile(
      "{ .reg .b64 p, q; ld.relaxed.gpu.global.v2.b64 {p, q}, [%4];\n"
      "mov.b64 {%0, %1}, p; mov.b64 {%2, %3}, q; }"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from)
      : "memory");
  return v;
}

DEVICE uint4 load_relaxed_words(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// What this thread stored before is there for whoever loads the value by `load_acquire`.
DEVICE void store_release(u32* to, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

DEVICE u32 load_acquire(const u32* from) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// Both at once; returns what was there.
DEVICE u32 add_and_order(u32* to, u32 value) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(value)
               : "memory");
  return before;
}

// ---- tensor cores --------------------------------------------------------------------------------

DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- pairs of bf16 in one register ---------------------------------------------------------------

DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// a - b, exact where used. sm_80 has no subtraction of bf16 pairs; one FMA rounds as well.
DEVICE u32 sub_pair(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 d;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return fma_pair(b, 0xBF80BF80u, a);
#endif
}

#if __CUDA_ARCH__ >= 900
// 1 where a > 0, else 0.
DEVICE u32 is_positive_pair(u32 a) {
  u32 d;
  asm("set.gt.bf16x2.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(0));
  return d;
}
#endif

// (a & mask) | bits in one instruction
DEVICE u32 mask_or(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

// (a & mask) ^ bits in one instruction
DEVICE u32 mask_xor(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

DEVICE float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

DEVICE float half_to_float(u32 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  return f;
}

DEVICE u32 float_to_bf16(float f) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
}

// Two floats as a pair of bf16: one fast instruction, where single ones share the slow unit of exponentials.
DEVICE u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// 2^x, to 2 ulp; tiny results are zero.
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- programmatic dependent launch ---------------------------------------------------------------

// The next kernel may start: what it reads of ours it waits for.
DEVICE void launch_dependents() {
#if HAS_BULK_COPY
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Everything that earlier kernels of the stream wrote is visible from here on.
DEVICE void wait_for_earlier_kernels() {
#if HAS_BULK_COPY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if HAS_BULK_COPY
// ---- barriers in shared memory -------------------------------------------------------------------

DEVICE void barrier_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// What this thread wrote to shared memory is known to the copy engine from here on.
DEVICE void publish_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers that this thread has initialised are known to the copy engine from here on.
DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  publish_to_copies();
}

DEVICE void barrier_arrive(u32 bar) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(bar) : "memory");
}

DEVICE void barrier_wait(u32 bar, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  }
}

// ---- copy engine and clusters (sm_90 and later) --------------------------------------------------

DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(bar),
               "r"(bytes)
               : "memory");
}

// Weights are read once: they leave the L2 first. This is what createpolicy.fractional.L2::evict_first makes for
// all of an access, as CUTLASS has it too (TMA::CacheHintSm90); to ask for it costs seven instructions a copy.
DEVICE u64 evict_first_policy() { return 0x12F0000000000000; }

DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
      "%2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(bar)
      : "memory");
}

// One lane of the warp, all of which ask. The compiler knows that it is one, so that the copies it issues take
// no loop over lanes that might differ.
DEVICE bool is_elected() {
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected;
}

// A copy into all blocks of the cluster that have a bit in `blocks`: at the same place in each, counted by
// the barrier at the same place in each.
DEVICE void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 bar, u32 blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], "
      "%2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "h"((u16)blocks)
      : "memory");
}

// A warp's copy of two pieces into its shared memory, by one of its lanes; `bar` counts the bytes. There is
// no second piece where `more` is 0. Told by elect.sync, the compiler issues it once, without a loop over
// lanes that might differ.
DEVICE void bulk_load_by_warp(u32 to, const void* from, u32 bytes, u32 to_more, const void* from_more,
                              u32 more, u32 bar, u64 policy) {
  asm volatile(
      "{ .reg .pred p, q; .reg .b64 t; .reg .u32 all;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "add.u32 all, %2, %5;\n"
      "setp.ne.and.u32 q, %5, 0, p;\n"
      "@p mbarrier.arrive.expect_tx.shared::cta.b64 t, [%6], all;\n"
      "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
      "%2, [%6], %7;\n"
      "@q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%3], [%4], "
      "%5, [%6], %7; }" ::"r"(to),
      "l"(from), "r"(bytes), "r"(to_more), "l"(from_more), "r"(more), "r"(bar), "l"(policy)
      : "memory");
}

// A box of a row-major matrix, from column x and row y; what lies outside arrives as zeros.
DEVICE void tensor_load(u32 to, const TensorMap* map, int x, int y, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(bar)
      : "memory");
}

// The same into all blocks of the cluster that have a bit in `blocks`, as bulk_load_multicast does.
DEVICE void tensor_load_multicast(u32 to, const TensorMap* map, int x, int y, u32 bar, u32 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(bar), "h"((u16)blocks)
      : "memory");
}

// The copy engine will need it soon.
DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Barriers initialised before are known to the cluster once all its threads have arrived.
DEVICE void cluster_arrive() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// What this thread wrote is visible to all of the cluster once they have waited.
DEVICE void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same shared address in another block of the cluster.
DEVICE u32 remote_address(u32 at, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
  return r;
}

DEVICE float load_remote(u32 at) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}

DEVICE void store_remote(u32 at, const float (&v)[4]) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

// What a warp has read by then may be overwritten by copies that come after it.
DEVICE void barrier_arrive_remote(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

// The same, and by stores of another block that waits for it; a fence of the whole GPU, in machine code.
DEVICE void barrier_release_remote(u32 bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Floats into another block's shared memory; a barrier there counts their bytes.
#define STORE_REMOTE "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"

DEVICE void store_remote(u32 to, const float (&v)[4], u32 bar) {
  asm volatile(STORE_REMOTE ".v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]),
               "f"(v[3]), "r"(bar)
               : "memory");
}

DEVICE void store_remote(u32 to, const float (&v)[2], u32 bar) {
  asm volatile(STORE_REMOTE ".v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(v[0]), "f"(v[1]), "r"(bar) : "memory");
}

DEVICE void store_remote(u32 to, const float (&v)[1], u32 bar) {
  asm volatile(STORE_REMOTE ".f32 [%0], %1, [%2];" ::"r"(to), "f"(v[0]), "r"(bar) : "memory");
}

// Waits for what other blocks of the cluster did before they arrived.
DEVICE void barrier_wait_cluster(u32 bar, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  }
}
#endif
