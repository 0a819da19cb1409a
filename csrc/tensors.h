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

// Working memory that a thread keeps from call to call. Of the heap each call gets what other code has had meanwhile,
// which is in no cache, and large parts of it are mapped, and cleared page by page, at every call.
class Workspace {
 public:
  static constexpr size_t BYTES = size_t{8} << 20;
  static constexpr std::align_val_t PAGE{4096};

  Workspace() = default;
  ~Workspace() {
    if (base != nullptr) ::operator delete(base, PAGE);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  static Workspace& of_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }

  // Null where it does not fit. `bytes` is a multiple of 64 and not 0, here and below.
  char* take(size_t bytes) {
    if (bytes > BYTES - used) return nullptr;
    if (base == nullptr) base = static_cast<char*>(::operator new(BYTES, PAGE));
    char* const at = base + used;
    used += bytes, ++parts;
    return at;
  }

  // False for what is not of it. A part that is not the last to be taken is free again when all are.
  bool give(char* at, size_t bytes) {
    if (base == nullptr || at < base || at >= base + BYTES) return false;
    if (at + bytes == base + used) used -= bytes;
    if (--parts == 0) used = 0;
    return true;
  }

 private:
  char* base = nullptr;
  size_t used = 0;
  int64_t parts = 0;
};

// Uninitialised floats from a 64-byte boundary on; they die in the thread that made them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : bytes((floats * sizeof(float) + 64) / 64 * 64), data(take(bytes)) {}
  ~Scratch() {
    char* const at = reinterpret_cast<char*>(data);
    if (!Workspace::of_thread().give(at, bytes)) ::operator delete(at, Workspace::PAGE);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  static float* take(size_t bytes) {
    char* const at = Workspace::of_thread().take(bytes);
    return reinterpret_cast<float*>(at != nullptr ? at : static_cast<char*>(::operator new(bytes, Workspace::PAGE)));
  }

  const size_t bytes;

 public:
  float* const data;
};

}  // namespace fusekern
