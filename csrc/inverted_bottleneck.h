// The inverted bottleneck: what its stages hand to the bodies. They work on tiles of some pixels and
// channels, and on rows of the map.
#pragma once

#include "attention.h"
#include "cpu.h"

namespace fusekern {

// Some pixels of a map or a tile: channel c of the i-th lies c channel past pixel n = first + i, and that
// n column into a tile (W = 0), else at its image, row and column of the map.
struct Pixels {
  void* data;
  int64_t first, H, W;
  int64_t batch, row, column, channel;  // strides
};

// An element-wise pass. Names of the vectors, one number a channel each, are those of the functions below.
struct BottleneckPass {
  bool bf16;
  bool rows;  // channels lie side by side, else pixels do: in all that is dense
  int64_t pixels, channels;
  Pixels a, b, out;         // b.data may be null where it says so
  const float* vectors[4];
  float* sums[3];
  int64_t before;  // pixels that the moments hold already
};

// The depthwise convolution with all that is done to a pixel before and after. Maps are [B, channels, H, W] and
// [B, channels, h, w]; vectors begin with the first channel.
struct BottleneckDepthwise {
  bool bf16, rows;
  int64_t B, channels, H, W, h, w, k, stride;
  int64_t block;  // channels of an item
  Map y1, y2;
  const void* wd;  // [channels][k][k]
  const float *affine1, *affine2, *coef2, *mean1;
  int64_t pitch;        // from one vector of affine1, affine2, coef2, stats2 or sums1 to the next
  float *stats2, *sums1;  // null: not wanted
  Map dz, d;
  void* dwd;

  int64_t ring_floats;     // of an item: rows of the map, activated, that the next row of the result needs
  int64_t scratch_floats;  // of a thread: the rest
};

FUSEKERN_BODY(
    // out = relu6(v0 a + v1)
    void bottleneck_activate(const BottleneckPass& pass);
    // The same of fp32 from rows to images: pixels of a channel lie side by side in out. Of each pixel a bit a channel,
    // in `row` bytes: not zero. Returns how many.
    int64_t bottleneck_activate_turned(const BottleneckPass& pass, uint8_t* bits, int64_t row);
    // out = v0 a + v1 (+ b)
    void bottleneck_affine(const BottleneckPass& pass);
    // out = v0 a + v1 (b - v3) + v2
    void bottleneck_coef(const BottleneckPass& pass);
    // out = a where 0 < v0 b + v1 < 6, else 0; sums += out, out (b - v2)
    void bottleneck_mask(const BottleneckPass& pass);
    // sums += a, a (b - v0)
    void bottleneck_sums(const BottleneckPass& pass);
    // sums: of `before` pixels the mean, the sum of squared distances from it, and what is to be added to the mean;
    // they take in those of a
    void bottleneck_moments(const BottleneckPass& pass);

    // Fills in the floats.
    void bottleneck_depthwise_plan(BottleneckDepthwise& op);
    // Of one image rows begin to end - 1 of relu6(affine2 y2), when those rows of y1 below `staged` that they need are
    // in the rings, one for each block of channels.
    void bottleneck_depthwise_rows(const BottleneckDepthwise& op, int64_t staged, int64_t begin, int64_t end,
                                   float* rings, float* scratch);
    // All rows of all images; items are blocks of channels.
    void bottleneck_depthwise_fwd(const BottleneckDepthwise& op, int64_t begin, int64_t end, float* scratch);
    void bottleneck_depthwise_bwd(const BottleneckDepthwise& op, int64_t begin, int64_t end, float* scratch);)

}  // namespace fusekern
