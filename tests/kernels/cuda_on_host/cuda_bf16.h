#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  std::uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    std::uint32_t all;
    std::memcpy(&all, &value, 4);
    bits = value != value ? 0x7fc0 : (all + 0x7fff + (all >> 16 & 1)) >> 16;  // to the nearest, ties to even
  }
  explicit operator float() const {
    const std::uint32_t all = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &all, 4);
    return value;
  }
};

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
