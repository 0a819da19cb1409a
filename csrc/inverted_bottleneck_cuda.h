// The depthwise stages of inverted_bottleneck on CUDA, as launchers of raw pointers: what nvcc compiles knows no torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fusekern::dw {

enum class Type { float32, bfloat16, float16 };

// What a launcher takes. Maps are dense, all of them channels_last or all NCHW; y1 and d are H x W, y2 and dz h x w.
struct Problem {
  Type type;
  bool channels_last;
  int K, stride;
  int B, E, H, W, h, w;
};

// Tiles are dealt out in parts: so many rows of partial sums, of three (forward) or K * K + 2 (backward) by E floats.
int forward_parts(const Problem& problem);
int backward_parts(const Problem& problem);

// Of a norm, [E], fp32 or of the maps' type; or none.
struct Parameter {
  const void* data;
  Type type;
};

struct Gradient {
  void* data;
  Type type;
};

// A norm whose vectors are to be made of statistics.
struct NormForward {
  Parameter weight, bias;
  float eps;
  float* vectors;  // [5, E], or none
};

// The norm behind y1, if its statistics have not been joined: those of tiles of `pixels`, so many of them for each
// `size` pixels.
struct Before {
  const float* partial;  // [parts, 2, E], or none
  int parts, size, pixels;
  NormForward norm;
};

// The norm behind y1, of whose gradient the sums are.
struct NormBackward {
  const float* vectors;  // [5, E]
  Parameter weight;
  float eps;
  bool batch;
  float* coef;  // [4, E], or none
  Gradient dweight, dbias;
};

struct Forward {
  const void* y1;       // [B, E, H, W]
  const float* affine;  // [2, E], or none: then there is `before`, or y1 is relu6(v1) already
  const void* weight;   // [E, K, K]
  void* y2;             // [B, E, h, w]
  float* partial;       // [parts, 3, E], or none
  float* stats;         // [2, E], or none
  NormForward norm;
  // Zeros, one for each block of channels: the last of its blocks adds up. Without them it is a launch of its own.
  int* arrived;
  Before before;
};

struct Backward {
  const void* dz;       // [B, E, h, w]
  const void* y2;       // [B, E, h, w]
  const float* coef;    // [4, E]
  const void* y1;       // [B, E, H, W]
  const float* affine;  // [2, E]
  const float* mean;    // [E]
  const void* weight;   // [E, K, K]
  void* d;              // [B, E, H, W]
  void* dweight;        // [E, K, K]
  float* partial;       // [parts, K * K + 2, E]
  float* sums;          // [2, E]
  NormBackward norm;
  int* arrived;         // as in Forward
};

// Both return CUDA's error in words, or none.
const char* launch(const Problem& problem, const Forward& tensors, void* stream);
const char* launch(const Problem& problem, const Backward& tensors, void* stream);

struct Attributes {
  std::string name;
  int threads, registers = 0, local_bytes = 0, shared_bytes = 0;
};

// Of every kernel, as the driver has it for the current device. A name is "fwd float32 k3 s1 channels_last".
const char* forward_attributes(std::vector<Attributes>& kernels);
const char* backward_attributes(std::vector<Attributes>& kernels);

}  // namespace fusekern::dw
