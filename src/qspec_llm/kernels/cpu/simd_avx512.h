// Sixteen lanes on AVX-512 F/BW/DQ/VL/VNNI: one register each. Included inside an anonymous
// namespace, after <immintrin.h>.

using V = __m512;
using I = __m512i;

constexpr int kMaxRows[4] = {8, 8, 6, 4};  // rows that fit in registers, by number of limbs
#define QSPEC_INLINE inline __attribute__((always_inline))

QSPEC_INLINE V zero() { return _mm512_setzero_ps(); }
QSPEC_INLINE V set1(float x) { return _mm512_set1_ps(x); }
QSPEC_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
QSPEC_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
QSPEC_INLINE V load_n(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
QSPEC_INLINE void store_n(float* p, V x, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
}
QSPEC_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
QSPEC_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
QSPEC_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
QSPEC_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
QSPEC_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// c - a b
QSPEC_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
QSPEC_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
QSPEC_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
QSPEC_INLINE float hsum(V x) { return _mm512_reduce_add_ps(x); }
QSPEC_INLINE float hmax(V x) { return _mm512_reduce_max_ps(x); }

QSPEC_INLINE I zero_i() { return _mm512_setzero_si512(); }
QSPEC_INLINE I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
QSPEC_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
QSPEC_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
QSPEC_INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
QSPEC_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
QSPEC_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
template <int N> QSPEC_INLINE I shl(I x) { return _mm512_slli_epi32(x, N); }
template <int N> QSPEC_INLINE I shr(I x) { return _mm512_srli_epi32(x, N); }
template <int N> QSPEC_INLINE I sar(I x) { return _mm512_srai_epi32(x, N); }
QSPEC_INLINE int32_t hmax_i(I x) { return _mm512_reduce_max_epi32(x); }
QSPEC_INLINE int32_t hsum_i(I x) { return _mm512_reduce_add_epi32(x); }
QSPEC_INLINE V as_float(I x) { return _mm512_castsi512_ps(x); }
QSPEC_INLINE I as_int(V x) { return _mm512_castps_si512(x); }
QSPEC_INLINE V to_float(I x) { return _mm512_cvtepi32_ps(x); }
QSPEC_INLINE I to_int(V x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
QSPEC_INLINE V round_even(V x) { return _mm512_roundscale_ps(x, 8); }
QSPEC_INLINE void store_bytes(int8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

QSPEC_INLINE V load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
QSPEC_INLINE V load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Rounded to bf16, still as float.
QSPEC_INLINE V round_bf16(V x) {
  const I bits = as_int(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const I cut = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000)));
  return _mm512_mask_mov_ps(as_float(cut), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}
QSPEC_INLINE void store_bf16(uint16_t* p, V rounded) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(as_int(rounded), 16)));
}

struct Word {
  int8_t bytes[4];
};
// acc + 4 products a lane: bytes u unsigned, the four bytes at x signed and the same in all lanes.
QSPEC_INLINE I dot_u8(I acc, I u, const int8_t* x) {
  // GCC does not fold the broadcast into the product: twice the instructions, and copies of acc
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*reinterpret_cast<const Word*>(x)));
  return acc;
}
QSPEC_INLINE I dot_u4(I acc, I u, const int8_t* x) { return dot_u8(acc, u, x); }

// 16 (c - 7.5) for the code in the lowest four bits of each lane.
QSPEC_INLINE V anchor_level(I code) {
  const V table = _mm512_setr_ps(-120, -104, -88, -72, -56, -40, -24, -8, 8, 24, 40, 56, 72, 88,
                                 104, 120);
  return _mm512_permutexvar_ps(code, table);
}

// The complemented residual of column J of 8, in bits 16..27, zero elsewhere.
template <int J> QSPEC_INLINE I residual(I n4, I n8) {
  constexpr int byte = J & 3;
  const I at2 = _mm512_set1_epi32(static_cast<int32_t>(0x80008080u | (byte << 16)));
  const I lane = _mm512_set4_epi32(0x0C0C0C0C & 0x00FF0000, 0x08080808 & 0x00FF0000,
                                   0x04040404 & 0x00FF0000, 0);
  const I low = _mm512_shuffle_epi8(n8, _mm512_add_epi32(at2, lane));
  constexpr int from = 8 * byte + (J >= 4 ? 4 : 0);
  I high;
  if constexpr (from <= 24) high = _mm512_slli_epi32(n4, 24 - from);
  else high = _mm512_srli_epi32(n4, from - 24);
  // (high & 0x0F000000) | low
  return _mm512_ternarylogic_epi32(high, _mm512_set1_epi32(0x0F000000), low, 0xEA);
}
// bits(anchor) - n, or zero where n is all ones.
QSPEC_INLINE V apply_residual(V anchor, I n) {
  const __mmask16 is_nonzero = _mm512_cmpneq_epi32_mask(n, _mm512_set1_epi32(0x0FFF0000));
  return as_float(_mm512_maskz_sub_epi32(is_nonzero, as_int(anchor), n));
}

// Lane i is the sum of the lanes of rows[i].
QSPEC_INLINE V reduce16(const V* rows) {
  V a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs of rows (i, i + 8)
    const V x = rows[i], y = rows[i + 8];
    a[i] = add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // rows i, i + 8, i + 4, i + 12
    b[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
               _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    c[i] = add(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
  }
  const V d = add(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
  // d: 128-bit lanes hold rows 0.., 8.., 4.., 12..
  return _mm512_shuffle_f32x4(d, d, 0xD8);
}

QSPEC_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
// Into the second-level cache only: far ahead, where the first level has no room to wait.
QSPEC_INLINE void prefetch_far(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}
