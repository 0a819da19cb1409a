// What former2conv and conv2former hand to their bodies: raw pointers with strides. Plain data only, see simd.h.
#pragma once

#include <cstdint>

namespace fusekern {

// [B, C, H, W], any strides, counted in elements. Pixel n = h W + w.
struct Map {
  void* data;
  int64_t batch, channel, row, column;  // strides
};

// [B, K, C], any strides.
struct Tokens {
  void* data;
  int64_t batch, token, channel;  // strides
};

// Sizes of one attention between the pixels of a map and the tokens of a text.
struct Attention {
  int64_t B, C, H, W, K, heads;
  int64_t d;  // C / heads
  float scale;
};

}  // namespace fusekern
