// How a group of activations becomes whole numbers. Defines wanted: TOP, the largest code, 0 for none.

#pragma once

#include "ptx.cuh"

// a / b correctly rounded, from the correctly rounded inverse of b, where no remainder underflows: one step of
// remainder makes up for the product's rounding (Markstein 1990).
DEVICE float divide(float a, float b, float inverse) {
  const float quotient = __fmul_rn(a, inverse);
  return __fmaf_rn(__fmaf_rn(-quotient, b, a), inverse, quotient);
}

// The scale of a group whose largest magnitude is `top`: value / scale, rounded, is a code.
struct Scale {
  float value;
  bool is_usual;  // where no remainder below underflows; nor does it of zeros

  DEVICE explicit Scale(float top) : is_usual(!(top > 0.f && top <= 1.1e-28f) && top < 1e30f) {
    value = is_usual ? divide(top, (float)TOP, 1.f / TOP) : __fdiv_rn(top, (float)TOP);
    divisor = fmaxf(value, 1.1754943508222875e-38f);
    inverse = __frcp_rn(divisor);
  }

  // x / value rounded to the nearest whole number, in the low byte, as IEEE division gives it.
  DEVICE u32 code(float x) const { return is_usual ? usual_code(x) : rounded(__fdiv_rn(x, divisor)); }

  // The same where the scale is a usual one, at a quarter of the instructions.
  DEVICE u32 usual_code(float x) const { return rounded(divide(x, divisor, inverse)); }

 private:
  float divisor, inverse;

  // A sum with 1.5 * 2^23 has no digits behind the point; it ends in those of the whole number.
  DEVICE static u32 rounded(float quotient) {
    return __float_as_uint(__fadd_rn(fminf(fmaxf(quotient, -(float)TOP), (float)TOP), 12582912.f));
  }
};
