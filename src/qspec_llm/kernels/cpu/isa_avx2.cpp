// The kernels, compiled for one ISA. Everything is in an anonymous namespace and nothing inline of
// the standard library is used, so that the linker cannot hand this code to another unit.
#include <immintrin.h>

#include <cmath>

#include "kernels.h"

namespace qspec {
namespace {
#include "simd_avx2.h"
// in this order: later files use earlier ones
#include "linear.inl"
#include "rows.inl"
#include "attention.inl"
}  // namespace

const Kernels kAvx2 = {"avx2", fill,     linear, rms_norm, rope,   silu_mul,
                    add_rows, hadamard, attend, merge,    finish, widen,
                    narrow,   read_memory};

}  // namespace qspec
