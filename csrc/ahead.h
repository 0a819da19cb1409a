// Memory that is fetched into the cache beside other work, for the bodies of products.
#pragma once

#include "matrix_product.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace product {

constexpr int LINE = 16;  // floats

// Lines to bring into the cache, `length` side by side and then the next row of them.
struct Ahead {
  const float* at;
  int64_t left, length, skip, done;

  FUSEKERN_INLINE void fetch(Ahead& ahead) {
    if (ahead.left == 0) return;
    prefetch(ahead.at);
    ahead.at += LINE, --ahead.left;
    if (++ahead.done == ahead.length) ahead.done = 0, ahead.at += ahead.skip;
  }
};

FUSEKERN_INLINE Ahead ahead_of(const Beside& beside) {
  return {beside.at, beside.rows * beside.lines, beside.lines, beside.row - beside.lines * LINE, 0};
}

}  // namespace product

}  // namespace fusekern::FUSEKERN_ISA
