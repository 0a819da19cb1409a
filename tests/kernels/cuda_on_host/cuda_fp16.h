#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;

  __half() = default;
  explicit __half(float value) : value(static_cast<_Float16>(value)) {}
  explicit operator float() const { return static_cast<float>(value); }
};

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }

inline __half larger(__half a, __half b) {
  const float x(a), y(b);
  return x != x || x > y ? a : b;
}
inline __half smaller(__half a, __half b) {
  const float x(a), y(b);
  return x != x || x < y ? a : b;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {larger(a.x, b.x), larger(a.y, b.y)}; }
inline __half2 __hmin2_nan(__half2 a, __half2 b) { return {smaller(a.x, b.x), smaller(a.y, b.y)}; }
