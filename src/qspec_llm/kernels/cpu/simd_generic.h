// Sixteen lanes in portable C++: plain loops that a compiler may vectorise. Included inside an
// anonymous namespace, after <cmath> and <cstring>.

struct V { float v[16]; };
struct I { int32_t v[16]; };

constexpr int kMaxRows[4] = {2, 2, 2, 1};  // rows computed together, by number of limbs
#define QSPEC_INLINE inline

template <class F> QSPEC_INLINE V each(F f) {
  V out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}
template <class F> QSPEC_INLINE I each_i(F f) {
  I out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<int32_t>(f(i));
  return out;
}
QSPEC_INLINE uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }

QSPEC_INLINE V set1(float x) { return each([&](int) { return x; }); }
QSPEC_INLINE V zero() { return set1(0.0f); }
QSPEC_INLINE V load(const float* p) { return each([&](int i) { return p[i]; }); }
QSPEC_INLINE void store(float* p, V x) { std::memcpy(p, x.v, sizeof x.v); }
QSPEC_INLINE V load_n(const float* p, int n) {
  return each([&](int i) { return i < n ? p[i] : 0.0f; });
}
QSPEC_INLINE void store_n(float* p, V x, int n) { std::memcpy(p, x.v, sizeof(float) * n); }
QSPEC_INLINE V add(V x, V y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
QSPEC_INLINE V sub(V x, V y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
QSPEC_INLINE V mul(V x, V y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
QSPEC_INLINE V div(V x, V y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
QSPEC_INLINE V fma(V x, V y, V z) { return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
// z - x y
QSPEC_INLINE V fnma(V x, V y, V z) { return each([&](int i) { return z.v[i] - x.v[i] * y.v[i]; }); }
QSPEC_INLINE V max(V x, V y) {
  return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
QSPEC_INLINE V min(V x, V y) {
  return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
}
QSPEC_INLINE float hsum(V x) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  return x.v[0];
}
QSPEC_INLINE float hmax(V x) {
  for (int i = 1; i < 16; ++i) x.v[0] = x.v[0] > x.v[i] ? x.v[0] : x.v[i];
  return x.v[0];
}

QSPEC_INLINE I set1_i(int32_t x) { return each_i([&](int) { return x; }); }
QSPEC_INLINE I zero_i() { return set1_i(0); }
QSPEC_INLINE I load_i(const void* p) {
  I out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
QSPEC_INLINE I add_i(I x, I y) { return each_i([&](int i) { return bits(x.v[i]) + bits(y.v[i]); }); }
QSPEC_INLINE I sub_i(I x, I y) { return each_i([&](int i) { return bits(x.v[i]) - bits(y.v[i]); }); }
QSPEC_INLINE I max_i(I x, I y) {
  return each_i([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
QSPEC_INLINE I and_i(I x, I y) { return each_i([&](int i) { return x.v[i] & y.v[i]; }); }
template <int N> QSPEC_INLINE I shl(I x) { return each_i([&](int i) { return bits(x.v[i]) << N; }); }
template <int N> QSPEC_INLINE I shr(I x) { return each_i([&](int i) { return bits(x.v[i]) >> N; }); }
template <int N> QSPEC_INLINE I sar(I x) { return each_i([&](int i) { return x.v[i] >> N; }); }
QSPEC_INLINE int32_t hmax_i(I x) {
  for (int i = 1; i < 16; ++i) x.v[0] = x.v[0] > x.v[i] ? x.v[0] : x.v[i];
  return x.v[0];
}
QSPEC_INLINE int32_t hsum_i(I x) {
  uint32_t total = 0;
  for (int i = 0; i < 16; ++i) total += bits(x.v[i]);
  return static_cast<int32_t>(total);
}
QSPEC_INLINE V as_float(I x) {
  V out;
  std::memcpy(out.v, x.v, sizeof x.v);
  return out;
}
QSPEC_INLINE I as_int(V x) {
  I out;
  std::memcpy(out.v, x.v, sizeof x.v);
  return out;
}
QSPEC_INLINE V to_float(I x) { return each([&](int i) { return static_cast<float>(x.v[i]); }); }
QSPEC_INLINE V round_even(V x) { return each([&](int i) { return nearbyintf(x.v[i]); }); }
QSPEC_INLINE I to_int(V x) {  // to nearest, ties to even; what does not fit is the lowest integer
  return each_i([&](int i) {
    return fabsf(x.v[i]) < 2147483648.0f ? static_cast<int32_t>(nearbyintf(x.v[i])) : INT32_MIN;
  });
}
QSPEC_INLINE void store_bytes(int8_t* p, I x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}

QSPEC_INLINE V load_bf16(const uint16_t* p) {
  return as_float(each_i([&](int i) { return static_cast<uint32_t>(p[i]) << 16; }));
}
QSPEC_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value;
  if (exponent == 31) value = mantissa ? NAN : INFINITY;
  else if (exponent == 0) value = ldexpf(static_cast<float>(mantissa), -24);
  else value = ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
  return sign ? -value : value;
}
QSPEC_INLINE V load_f16(const uint16_t* p) { return each([&](int i) { return half_to_float(p[i]); }); }
// Rounded to bf16, still as float.
QSPEC_INLINE V round_bf16(V x) {
  const I in = as_int(x);
  const I cut = each_i([&](int i) {
    const uint32_t b = bits(in.v[i]);
    return (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000u;
  });
  const V rounded = as_float(cut);
  return each([&](int i) { return x.v[i] == x.v[i] ? rounded.v[i] : x.v[i]; });
}
QSPEC_INLINE void store_bf16(uint16_t* p, V rounded) {
  const I in = as_int(rounded);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(bits(in.v[i]) >> 16);
}

// acc + 4 products a lane: bytes u unsigned, the four bytes at x signed and the same in all lanes.
QSPEC_INLINE I dot_u8(I acc, I u, const int8_t* x) {
  uint8_t bytes[64];
  std::memcpy(bytes, u.v, sizeof bytes);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += bytes[4 * i + j] * x[j];
  return acc;
}
QSPEC_INLINE I dot_u4(I acc, I u, const int8_t* x) { return dot_u8(acc, u, x); }

// 16 (c - 7.5) for the code in the lowest four bits of each lane.
QSPEC_INLINE V anchor_level(I code) {
  return each([&](int i) { return static_cast<float>(16 * (code.v[i] & 15) - 120); });
}

// The complemented residual of column J of 8, in bits 16..27, zero elsewhere.
template <int J> QSPEC_INLINE I residual(I n4, I n8) {
  constexpr int byte = J & 3;
  constexpr int nibble = 8 * byte + (J >= 4 ? 4 : 0);
  return each_i([&](int i) {
    return ((bits(n4.v[i]) >> nibble) & 15) << 24 | ((bits(n8.v[i]) >> (8 * byte)) & 255) << 16;
  });
}
// bits(anchor) - n, or zero where n is all ones.
QSPEC_INLINE V apply_residual(V anchor, I n) {
  const I in = as_int(anchor);
  return as_float(
      each_i([&](int i) { return n.v[i] == 0x0FFF0000 ? 0u : bits(in.v[i]) - bits(n.v[i]); }));
}

// Lane i is the sum of the lanes of rows[i].
QSPEC_INLINE V reduce16(const V* rows) { return each([&](int i) { return hsum(rows[i]); }); }

QSPEC_INLINE void prefetch(const void*) {}
QSPEC_INLINE void prefetch_far(const void*) {}
