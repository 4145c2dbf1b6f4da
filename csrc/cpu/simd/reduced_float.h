// bfloat16 and float16 in memory, one number at a time and in plain code; Vec has the
// vectors. Both round to the nearest, ties to even, and keep NaN.
#pragma once
#include <cstdint>

namespace dlkernels::cpu {
namespace {

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t b = __builtin_bit_cast(uint32_t, x);
    bits = static_cast<uint16_t>((x != x ? b | 1u << 22 : b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
};

// Five bits of exponent, ten of fraction. Numbers below 2^-14 have fewer: they are whole multiples
// of 2^-24.
struct Float16 {
  uint16_t bits;

  Float16() = default;
  explicit Float16(float x) {
    const uint32_t b = __builtin_bit_cast(uint32_t, x), size = b & 0x7fffffff;
    uint32_t half;
    if (x != x)
      half = 0x7e00 | (size >> 13 & 0x3ff);
    else if (size >= 0x47800000)  // 2^16
      half = 0x7c00;
    else if (size < 0x38800000)  // 2^-14: 0.5 has a last bit of 2^-24, so the sum rounds there
      half = __builtin_bit_cast(uint32_t, __builtin_fabsf(x) + 0.5f) - 0x3f000000;
    else
      half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    bits = static_cast<uint16_t>((b >> 16 & 0x8000) | half);
  }
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, half = bits & 0x7fffu;
    if (half < 0x400) return __builtin_bit_cast(float, sign | small(half));
    const uint32_t bias = half < 0x7c00 ? 112u << 23 : 224u << 23;  // of infinity and NaN
    return __builtin_bit_cast(float, sign | ((half << 13) + bias));
  }

 private:
  static uint32_t small(uint32_t half) {
    return __builtin_bit_cast(uint32_t, static_cast<float>(half) * 0x1p-24f);
  }
};

}  // namespace
}  // namespace dlkernels::cpu
