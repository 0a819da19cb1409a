// What the ops share on this side of their bodies: tensors as raw pointers, working memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <new>

#include "attention.h"

namespace fusekern {

inline Map map_of(const torch::stable::Tensor& t) {  // [B, C, H, W]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Tokens tokens_of(const torch::stable::Tensor& t) {  // [B, K, C]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Uninitialised floats from a 64-byte boundary on.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data(static_cast<float*>(::operator new(floats * sizeof(float), ALIGNMENT))) {}
  ~Scratch() { ::operator delete(data, ALIGNMENT); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* const data;

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
};

}  // namespace fusekern
