// How a group of activations becomes whole numbers. Defines wanted: TOP, the largest code, 0 for none.

#pragma once

#include "ptx.cuh"

// The scale of a group whose largest magnitude is `top`: value / scale, rounded, is a code.
struct Scale {
  float value;

  DEVICE explicit Scale(float top) : value(__fdiv_rn(top, (float)TOP)) {
    divisor = fmaxf(value, 1.1754943508222875e-38f);
    inverse = __frcp_rn(divisor);
    // where no remainder below underflows
    is_usual = divisor > 7.888609052210118e-31f && divisor < 1.2676506002282294e30f;
  }

  // x / value rounded to the nearest whole number, as IEEE division gives it: a product with the
  // correctly rounded inverse and one step of remainder is the correctly rounded quotient (Markstein
  // 1990), at a quarter of the instructions.
  DEVICE int code(float x) const {
    float quotient = __fmul_rn(x, inverse);
    quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor, x), inverse, quotient);
    if (!is_usual) quotient = __fdiv_rn(x, divisor);
    return max(-TOP, min(TOP, __float2int_rn(quotient)));
  }

 private:
  float divisor, inverse;
  bool is_usual;
};
