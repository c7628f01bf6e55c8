// Sixteen lanes on AVX2 + FMA + F16C: two registers each. Included inside an anonymous namespace,
// after <immintrin.h>.

struct V { __m256 a, b; };
struct I { __m256i a, b; };

constexpr int kMaxRows[4] = {3, 4, 3, 2};  // rows that fit in registers, by number of limbs
#define QSPEC_INLINE inline __attribute__((always_inline))

QSPEC_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
QSPEC_INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QSPEC_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QSPEC_INLINE void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
QSPEC_INLINE V load_n(const float* p, int n) {
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
QSPEC_INLINE void store_n(float* p, V x, int n) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
QSPEC_INLINE V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QSPEC_INLINE V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QSPEC_INLINE V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QSPEC_INLINE V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QSPEC_INLINE V fma(V x, V y, V z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// z - x y
QSPEC_INLINE V fnma(V x, V y, V z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
QSPEC_INLINE V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
QSPEC_INLINE V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
QSPEC_INLINE float hsum(V x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
QSPEC_INLINE float hmax(V x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}

QSPEC_INLINE I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
QSPEC_INLINE I set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
QSPEC_INLINE I load_i(const void* p) {
  const auto* words = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
QSPEC_INLINE I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
QSPEC_INLINE I sub_i(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
QSPEC_INLINE I max_i(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
QSPEC_INLINE I and_i(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N> QSPEC_INLINE I shl(I x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N> QSPEC_INLINE I shr(I x) {
  return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
template <int N> QSPEC_INLINE I sar(I x) {
  return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
QSPEC_INLINE int32_t hmax_i(I x) {
  const __m256i s = _mm256_max_epi32(x.a, x.b);
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}
QSPEC_INLINE int32_t hsum_i(I x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}
QSPEC_INLINE V as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
QSPEC_INLINE I as_int(V x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
QSPEC_INLINE V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
QSPEC_INLINE I to_int(V x) {  // to nearest, ties to even
  return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
QSPEC_INLINE V round_even(V x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
QSPEC_INLINE void store_bytes(int8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

QSPEC_INLINE V load_bf16(const uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return as_float(shl<16>({_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)),
                           _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))}));
}
QSPEC_INLINE V load_f16(const uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
// Rounded to bf16, still as float.
QSPEC_INLINE V round_bf16(V x) {
  const I odd = and_i(shr<16>(as_int(x)), set1_i(1));
  const I up = add_i(add_i(as_int(x), set1_i(0x7FFF)), odd);
  const V cut = as_float(and_i(up, set1_i(static_cast<int32_t>(0xFFFF0000))));
  return {_mm256_blendv_ps(cut.a, x.a, _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)),
          _mm256_blendv_ps(cut.b, x.b, _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))};
}
QSPEC_INLINE void store_bf16(uint16_t* p, V rounded) {
  const I high = shr<16>(as_int(rounded));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(_mm256_packus_epi32(high.a, high.b), 0xD8));
}

// acc + 4 products a lane: nibbles u unsigned, the four bytes at x signed and the same in all
// lanes. Pairs of products stay below 2^15 because u does not pass 15.
QSPEC_INLINE I dot_scaled(I acc, I u, const int8_t* x, int16_t factor) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  const __m256i xs = _mm256_set1_epi32(word), by = _mm256_set1_epi16(factor);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(u.a, xs), by)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(u.b, xs), by))};
}
QSPEC_INLINE I dot_u4(I acc, I u, const int8_t* x) { return dot_scaled(acc, u, x, 1); }
// Whole bytes go as two nibbles: their pairs of products would saturate.
QSPEC_INLINE I dot_u8(I acc, I u, const int8_t* x) {
  const I mask = set1_i(0x0F0F0F0F);
  acc = dot_scaled(acc, and_i(u, mask), x, 1);
  return dot_scaled(acc, and_i(shr<4>(u), mask), x, 16);
}

// 16 (c - 7.5) for the code in the lowest four bits of each lane.
QSPEC_INLINE V anchor_level(I code) {
  return fma(to_float(and_i(code, set1_i(15))), set1(16.0f), set1(-120.0f));
}

// The complemented residual of column J of 8, in bits 16..27, zero elsewhere.
template <int J> QSPEC_INLINE I residual(I n4, I n8) {
  constexpr int byte = J & 3;
  constexpr int from = 8 * byte + (J >= 4 ? 4 : 0);
  const I low = byte < 2 ? shl<(byte < 2 ? 16 - 8 * byte : 0)>(n8)
                         : shr<(byte < 2 ? 0 : 8 * byte - 16)>(n8);
  const I high = from <= 24 ? shl<(from <= 24 ? 24 - from : 0)>(n4)
                            : shr<(from <= 24 ? 0 : from - 24)>(n4);
  const I low_part = and_i(low, set1_i(0x00FF0000)), high_part = and_i(high, set1_i(0x0F000000));
  return {_mm256_or_si256(low_part.a, high_part.a), _mm256_or_si256(low_part.b, high_part.b)};
}
// bits(anchor) - n, or zero where n is all ones.
QSPEC_INLINE V apply_residual(V anchor, I n) {
  const I all = set1_i(0x0FFF0000), bits = sub_i(as_int(anchor), n);
  return as_float({_mm256_andnot_si256(_mm256_cmpeq_epi32(n.a, all.a), bits.a),
                   _mm256_andnot_si256(_mm256_cmpeq_epi32(n.b, all.b), bits.b)});
}

// Lane i is the sum of the lanes of rows[i].
QSPEC_INLINE __m256 reduce8(const V* rows) {
  __m256 c[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 x = _mm256_add_ps(rows[i].a, rows[i].b);
    const __m256 y = _mm256_add_ps(rows[i + 4].a, rows[i + 4].b);
    c[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  return _mm256_hadd_ps(_mm256_hadd_ps(c[0], c[1]), _mm256_hadd_ps(c[2], c[3]));
}
QSPEC_INLINE V reduce16(const V* rows) { return {reduce8(rows), reduce8(rows + 8)}; }

QSPEC_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
// Into the second-level cache only: far ahead, where the first level has no room to wait.
QSPEC_INLINE void prefetch_far(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}
