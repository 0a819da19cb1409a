// What a batch norm between the stages of inverted_bottleneck makes of their statistics and sums, channel by channel;
// fusekern/ops/_batch_norm.py says what the vectors are. Plain C++ apart from its marks for the device.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEKERN_BOTH __host__ __device__ __forceinline__
#else
#define FUSEKERN_BOTH inline
#endif

namespace fusekern {

FUSEKERN_BOTH float inverse_of(float count) { return 1.f / (count > 1.f ? count : 1.f); }

// A column of vectors, [5][channels], from the mean and the variances.
FUSEKERN_BOTH void norm_forward(float mean, float biased, float unbiased, float weight, float bias, float eps,
                                float* vectors, int64_t channels) {
  const float scale = weight / sqrtf(biased + eps);
  vectors[0] = scale;
  vectors[channels] = bias - mean * scale;
  vectors[2 * channels] = mean;
  vectors[3 * channels] = biased;
  vectors[4 * channels] = unbiased;
}

// A column of coef, [4][channels], and the weight's gradient: from a column of vectors, the sums of dv and
// dv (y - mean) over this process' pixels, and their means over those of all.
FUSEKERN_BOTH void norm_backward(const float* vectors, float product, float mean_dv, float mean_product, float weight,
                                 float eps, bool batch, float* coef, float* dweight, int64_t channels) {
  const float rstd = 1.f / sqrtf(vectors[3 * channels] + eps), p = weight * rstd;
  coef[0] = p;
  coef[channels] = batch ? -p * rstd * rstd * mean_product : 0.f;
  coef[2 * channels] = batch ? -p * mean_dv : 0.f;
  coef[3 * channels] = vectors[2 * channels];
  *dweight = product * rstd;
}

}  // namespace fusekern
