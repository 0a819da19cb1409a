// What the depthwise stages of inverted_bottleneck share on the device: tiles from and to memory, and launches.
//
// A block stages a tile of what its windows read, with its halo, in shared memory: relu6(v1), or dy2. So the norm and
// ReLU6 are computed once for an element, not once for each tap. y1 of the backward needs no halo, since one window of
// dy2 gives both gradients. Blocks walk over several tiles and leave partial sums, which the last of them to arrive adds
// in a fixed order, or a second kernel where they are many.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "bn_relu6_dw_tile.h"
#include "inverted_bottleneck_cuda.h"

namespace fusekern::dw {

// Pairs are rounded in one instruction.
__device__ __forceinline__ void write(__nv_bfloat16* to, const float (&from)[2]) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(from[0], from[1]);
}
__device__ __forceinline__ void write(__half* to, const float (&from)[2]) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(from[0], from[1]);
}

template <class T, int N>
__device__ __forceinline__ void round(const float (&from)[N], Pack<T, N>& to) {
#pragma unroll
  for (int v = 0; v < N; v += 2) {
    const float pair[2] = {from[v], from[v + 1]};
    write(to.values + v, pair);
  }
}

// ReLU6 of what has been rounded already: pairs in one instruction, which keeps a NaN.
__device__ __forceinline__ void relu6(Pack<__nv_bfloat16, 8>& to) {
  auto* const pairs = reinterpret_cast<__nv_bfloat162*>(to.values);
#pragma unroll
  for (int v = 0; v < 4; ++v)
    pairs[v] = __hmin2_nan(__hmax2_nan(pairs[v], __floats2bfloat162_rn(0.f, 0.f)), __floats2bfloat162_rn(6.f, 6.f));
}
__device__ __forceinline__ void relu6(Pack<__half, 8>& to) {
  auto* const pairs = reinterpret_cast<__half2*>(to.values);
#pragma unroll
  for (int v = 0; v < 4; ++v)
    pairs[v] = __hmin2_nan(__hmax2_nan(pairs[v], __floats2half2_rn(0.f, 0.f)), __floats2half2_rn(6.f, 6.f));
}
__device__ __forceinline__ void relu6(Pack<float, 4>& to) {
#pragma unroll
  for (int v = 0; v < 4; ++v) to.values[v] = relu6(to.values[v]);
}

namespace {

struct Map {
  int rows, columns, channels;
  bool wide;  // 16-byte accesses are aligned

  // Of an element, which may lie outside of the image.
  __device__ int64_t offset(bool last, int image, int channel, int row, int column) const {
    const int64_t pixel = static_cast<int64_t>(row) * columns + column;
    const int64_t pixels = static_cast<int64_t>(rows) * columns;
    return last ? (image * pixels + pixel) * channels + channel
                : (static_cast<int64_t>(image) * channels + channel) * pixels + pixel;
  }
};

struct Grid {
  Map source, target;
  int tiles_down, tiles_across, tiles, run;  // run: tiles of a block
};

// ---- vectors between memory and a tile ---------------------------------------------------------------------------

// N elements; unless the map is WIDE, and so has whole vectors alone, nothing is read or written from `count` on.
template <bool WIDE, class T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* from, int count) {
  Pack<T, N> pack;
  if constexpr (WIDE) {
    *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(from));
  } else {
#pragma unroll
    for (int v = 0; v < N; ++v) pack.values[v] = v < count ? from[v] : T(0.f);
  }
  return pack;
}

template <bool WIDE, class T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack, int count) {
  if constexpr (WIDE) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
  } else {
#pragma unroll
    for (int v = 0; v < N; ++v)
      if (v < count) to[v] = pack.values[v];
  }
}

// The same pointer, of which the compiler does not know that it is the same: what is read through it in a loop is not
// kept in registers over the whole loop.
template <class T>
__device__ __forceinline__ const T* anew(const T* pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// Numbers of the channels of a vector: all different in channels_last, all the same in NCHW.
template <class Tile, int ROWS>
struct PerChannel {
  static constexpr int N = Tile::LAST ? Tile::VECTOR : 1;
  float values[ROWS][N];

  __device__ __forceinline__ PerChannel(const float* from, int channel, int channels) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
      for (int n = 0; n < N; ++n)
        values[row][n] = channel + n < channels ? from[static_cast<int64_t>(row) * channels + channel + n] : 0.f;
  }
  __device__ __forceinline__ float get(int row, int v) const { return values[row][Tile::LAST ? v : 0]; }
};

// How the vectors of a tile are dealt out to the threads in channels_last, and how many are loaded before one is used.
template <class Tile>
struct Share {
  static constexpr int VECTORS = Tile::CHANNELS / Tile::VECTOR, STEP = Tile::THREADS / VECTORS;
  static constexpr int PIXELS = Tile::SOURCE_ROWS * Tile::SOURCE_COLUMNS, COUNT = (PIXELS + STEP - 1) / STEP;
  static constexpr int HALF = (COUNT + 1) / 2, BATCH = HALF < 4 ? HALF : 4;
};

// Fills the source's tile, whose first pixel is at (row, column) of the map. load.operator()<WIDE>(offset, count) gets
// what apply(numbers, loaded, count) makes a vector of; offset is from that pixel and the block's first channel, the
// numbers are made by numbers_of(channel). All else is zero.
template <class Tile, bool WIDE, class T, class NumbersOf, class Load, class Apply>
__device__ __forceinline__ void stage_vectors(T* tile, const Map& map, int channel, int row, int column,
                                              const NumbersOf& numbers_of, const Load& load, const Apply& apply) {
  constexpr int N = Tile::VECTOR;
  using Loaded = decltype(load.template operator()<WIDE>(0, 0));
  const Pack<T, N> zeros = {};
  if constexpr (Tile::LAST) {
    constexpr int COLUMNS = Tile::SOURCE_COLUMNS, STEP = Share<Tile>::STEP, PIXELS = Share<Tile>::PIXELS;
    constexpr int BATCH = WIDE ? Share<Tile>::BATCH : 1;
    const int first = threadIdx.x % Share<Tile>::VECTORS * N, begin = threadIdx.x / Share<Tile>::VECTORS;
    const int count = map.channels - channel - first, line = map.columns * map.channels;
    const auto numbers = numbers_of(channel + first);
    int y = begin / COLUMNS, x = begin % COLUMNS, offset = y * line + x * map.channels + first;
    T* to = tile + begin * Tile::CHANNELS + first;
#pragma unroll 1
    for (int i = begin; i < PIXELS; i += BATCH * STEP) {
      Loaded loaded[BATCH];
      bool inside[BATCH];
#pragma unroll
      for (int n = 0; n < BATCH; ++n) {
        inside[n] = static_cast<unsigned>(row + y) < static_cast<unsigned>(map.rows) &&
                    static_cast<unsigned>(column + x) < static_cast<unsigned>(map.columns) && count > 0 &&
                    i + n * STEP < PIXELS;
        loaded[n] = {};
        if (inside[n]) loaded[n] = load.template operator()<WIDE>(offset, count);
        x += STEP % COLUMNS;
        y += STEP / COLUMNS;
        offset += STEP / COLUMNS * line + STEP % COLUMNS * map.channels;
        if (x >= COLUMNS) {
          x -= COLUMNS;
          ++y;
          offset += line - COLUMNS * map.channels;
        }
      }
#pragma unroll
      for (int n = 0; n < BATCH; ++n) {
        const Pack<T, N> pack = apply(numbers, loaded[n], count);
        if (i + n * STEP < PIXELS)
          *reinterpret_cast<Pack<T, N>*>(to + n * STEP * Tile::CHANNELS) = inside[n] ? pack : zeros;
      }
      to += BATCH * STEP * Tile::CHANNELS;
    }
  } else {
    // Vectors begin at multiples of their length, which the source's tile may not.
    constexpr int VECTORS = (Tile::SOURCE_COLUMNS + 2 * N - 2) / N;
    const int start = (column + N) / N * N - N - column, plane = map.rows * map.columns;
    for (int i = threadIdx.x; i < Tile::CHANNELS * Tile::SOURCE_ROWS * VECTORS; i += Tile::THREADS) {
      const int line = i / VECTORS, c = line / Tile::SOURCE_ROWS, y = line % Tile::SOURCE_ROWS;
      const int x = start + i % VECTORS * N, count = map.columns - column - x;
      const bool inside = row + y >= 0 && row + y < map.rows && column + x >= 0 && count > 0 &&
                          channel + c < map.channels;
      const Pack<T, N> pack =
          inside ? apply(numbers_of(channel + c),
                         load.template operator()<WIDE>(c * plane + y * map.columns + x, count), count)
                 : zeros;
#pragma unroll
      for (int v = 0; v < N; ++v)
        if (x + v >= 0 && x + v < Tile::SOURCE_COLUMNS) tile[line * Tile::SOURCE_ROW + x + v] = pack.values[v];
    }
  }
}

template <class Tile, class T, class NumbersOf, class Load, class Apply>
__device__ __forceinline__ void stage(T* tile, const Map& map, int channel, int row, int column,
                                      const NumbersOf& numbers_of, const Load& load, const Apply& apply) {
  if (map.wide)
    stage_vectors<Tile, true>(tile, map, channel, row, column, numbers_of, load, apply);
  else
    stage_vectors<Tile, false>(tile, map, channel, row, column, numbers_of, load, apply);
}

// Calls move.operator()<WIDE>(place in the tile, offset, count) for the vectors of the tile that is written, whose
// first pixel is at (row, column) of the map; offset is from there and the block's first channel. Vectors outside of
// the map have their place alone.
template <class Tile, bool WIDE, class Move, class Outside>
__device__ __forceinline__ void move_vectors(const Map& map, int channel, int row, int column, const Move& move,
                                             const Outside& outside) {
  constexpr int N = Tile::VECTOR, VECTORS = (Tile::LAST ? Tile::CHANNELS : Tile::COLUMNS) / N;
#pragma unroll (WIDE ? 4 : 1)
  for (unsigned i = threadIdx.x; i < Tile::SIZE / N; i += Tile::THREADS) {
    const int line = i / VECTORS, first = i % VECTORS * N;
    if constexpr (Tile::LAST) {
      const int y = i / VECTORS / Tile::COLUMNS, x = i / VECTORS % Tile::COLUMNS;
      if (row + y < map.rows && column + x < map.columns && channel + first < map.channels)
        move.template operator()<WIDE>(i * N, (y * map.columns + x) * map.channels + first,
                                       map.channels - channel - first);
      else
        outside(i * N);
    } else {
      const int c = line / Tile::ROWS, y = line % Tile::ROWS;
      if (row + y < map.rows && column + first < map.columns && channel + c < map.channels)
        move.template operator()<WIDE>(i * N, (c * map.rows + y) * map.columns + first, map.columns - column - first);
      else
        outside(i * N);
    }
  }
}

template <class Tile, class Move, class Outside>
__device__ __forceinline__ void for_vectors(const Map& map, int channel, int row, int column, const Move& move,
                                            const Outside& outside) {
  if (map.wide)
    move_vectors<Tile, true>(map, channel, row, column, move, outside);
  else
    move_vectors<Tile, false>(map, channel, row, column, move, outside);
}

// The weight of the block's channels, [K * K][CHANNELS].
template <class Tile, class T>
__device__ __forceinline__ void stage_weight(T* tile, const T* weight, int channel, int channels) {
  constexpr int TAPS = Tile::K * Tile::K;
  const int count = min(Tile::CHANNELS, channels - channel) * TAPS;
  for (int i = threadIdx.x; i < Tile::CHANNELS * TAPS; i += Tile::THREADS)
    tile[i % TAPS * Tile::CHANNELS + i / TAPS] = i < count ? weight[static_cast<int64_t>(channel) * TAPS + i] : T(0.f);
}

// A thread's own channels of it.
template <class Tile, class T>
__device__ __forceinline__ void read_weight(const T* tile, float (&to)[Tile::K][Tile::K][Tile::V]) {
#pragma unroll
  for (int i = 0; i < Tile::K; ++i)
#pragma unroll
    for (int j = 0; j < Tile::K; ++j)
      read(tile + (i * Tile::K + j) * Tile::CHANNELS + Tile::lane(threadIdx.x) * Tile::V, to[i][j]);
}

constexpr int WIDE = 32;  // channels of a block that adds, and threads that share one

__device__ __forceinline__ float value_of(const Parameter& parameter, int channel, float otherwise) {
  const void* const data = parameter.data;
  if (!data) return otherwise;
  if (parameter.type == Type::bfloat16) return static_cast<float>(static_cast<const __nv_bfloat16*>(data)[channel]);
  if (parameter.type == Type::float16) return static_cast<float>(static_cast<const __half*>(data)[channel]);
  return static_cast<const float*>(data)[channel];
}

__device__ __forceinline__ void store_value(const Gradient& to, int channel, float value) {
  if (!to.data) return;
  if (to.type == Type::bfloat16)
    static_cast<__nv_bfloat16*>(to.data)[channel] = static_cast<__nv_bfloat16>(value);
  else if (to.type == Type::float16)
    static_cast<__half*>(to.data)[channel] = static_cast<__half>(value);
  else
    static_cast<float*>(to.data)[channel] = value;
}

// Is this block the last of `count`? Then what the others have stored lies behind the L1 cache.
__device__ __forceinline__ bool last_to_arrive(int* counter, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == count - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// What the parts' moments, load(part, channel), come to in each of the block's channels, for the thread of that number.
template <class Tile, class Load>
__device__ __forceinline__ Moments join_parts(Moments* shared, int block, int parts, int channels, const Load& load) {
  constexpr int WIDTH = Tile::CHANNELS, SHARES = Tile::THREADS / WIDTH;
  static_assert(Tile::THREADS % WIDTH == 0 && sizeof(Moments) * Tile::THREADS <= 48 * 64);
  const int channel = block + threadIdx.x % WIDTH, share = threadIdx.x / WIDTH;
  Moments mine{0.f, 0.f, 0.f};
  if (channel < channels) {
#pragma unroll 8
    for (int i = share; i < parts; i += SHARES) mine = merge(mine, load(i, channel));
  }
  shared[threadIdx.x] = mine;
  __syncthreads();
  if (share == 0) {
#pragma unroll 1
    for (int i = 1; i < SHARES; ++i) mine = merge(mine, shared[i * WIDTH + threadIdx.x]);
  }
  return mine;
}

__device__ __forceinline__ void norm_forward(const Moments& seen, const NormForward& norm, int channel, float* vectors,
                                             int64_t channels) {
  fusekern::norm_forward(seen.mean, seen.m2 * inverse_of(seen.count), seen.m2 * inverse_of(seen.count - 1.f),
                         value_of(norm.weight, channel, 1.f), value_of(norm.bias, channel, 0.f), norm.eps, vectors,
                         channels);
}

// ---- launches ----------------------------------------------------------------------------------------------------

// f.operator()<T, Tile>() for what the problem asks: elements of three types, windows of 3 and 5, strides of 1 and 2,
// and both layouts.
template <bool BACKWARD, class T, class F>
auto with_tile(const Problem& problem, const F& f) {
  constexpr int BYTES = sizeof(T);
  const auto with_layout = [&]<int K, int S>() {
    if (problem.channels_last) return f.template operator()<T, Tile<BYTES, K, S, true, BACKWARD>>();
    return f.template operator()<T, Tile<BYTES, K, S, false, BACKWARD>>();
  };
  if (problem.K == 3)
    return problem.stride == 1 ? with_layout.template operator()<3, 1>() : with_layout.template operator()<3, 2>();
  return problem.stride == 1 ? with_layout.template operator()<5, 1>() : with_layout.template operator()<5, 2>();
}

template <bool BACKWARD, class F>
auto with_kernel(const Problem& problem, const F& f) {
  if (problem.type == Type::bfloat16) return with_tile<BACKWARD, __nv_bfloat16>(problem, f);
  if (problem.type == Type::float16) return with_tile<BACKWARD, __half>(problem, f);
  return with_tile<BACKWARD, float>(problem, f);
}

// Blocks enough for any device: where there are more, each has several tiles, and so there are fewer partial sums. The
// number must not depend on the device, since the order of the sums does on it.
#if !defined(FUSEKERN_DW_BLOCKS)
#define FUSEKERN_DW_BLOCKS 2048
#endif
constexpr int64_t ENOUGH = FUSEKERN_DW_BLOCKS;

template <class Tile>
Grid grid_of(const Problem& p) {
  const auto map = [&](int rows, int columns) {
    return Map{rows, columns, p.E, (Tile::LAST ? p.E : columns) % Tile::VECTOR == 0};
  };
  Grid grid{};
  grid.source = Tile::BACKWARD ? map(p.h, p.w) : map(p.H, p.W);
  grid.target = Tile::BACKWARD ? map(p.H, p.W) : map(p.h, p.w);
  grid.tiles_down = (grid.target.rows + Tile::ROWS - 1) / Tile::ROWS;
  grid.tiles_across = (grid.target.columns + Tile::COLUMNS - 1) / Tile::COLUMNS;
  grid.tiles = p.B * grid.tiles_down * grid.tiles_across;
  const int64_t blocks = static_cast<int64_t>(grid.tiles) * ((p.E + Tile::CHANNELS - 1) / Tile::CHANNELS);
  grid.run = static_cast<int>(blocks / ENOUGH > 0 ? blocks / ENOUGH : 1);
  if (grid.run > 32) grid.run = 32;
  return grid;
}

FUSEKERN_BOTH int parts_of(const Grid& grid) { return (grid.tiles + grid.run - 1) / grid.run; }

template <bool BACKWARD>
int parts_of_problem(const Problem& problem) {
  return with_kernel<BACKWARD>(problem, [&]<class T, class Tile>() { return parts_of(grid_of<Tile>(problem)); });
}

template <class Tile>
unsigned blocks_of(const Problem& p, const Grid& grid) {
  return static_cast<unsigned>(parts_of(grid)) * ((p.E + Tile::CHANNELS - 1) / Tile::CHANNELS);
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return true;
}

const char* words_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that the next check does not find it again
  return cudaGetErrorString(error);
}

// A launch, and what CUDA says about it.
template <class... Parameters, class... Arguments>
const char* start(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  return words_of(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <class Kernel>
const char* attributes_of(Kernel* kernel, Attributes& to) {
  cudaFuncAttributes found;
  if (const char* error = words_of(cudaFuncGetAttributes(&found, kernel))) return error;
  to.registers = found.numRegs;
  to.local_bytes = static_cast<int>(found.localSizeBytes);
  to.shared_bytes = static_cast<int>(found.sharedSizeBytes);
  return nullptr;
}

// Attributes of the kernels that kernel_of.operator()<T, Tile>() gives.
template <bool BACKWARD, class F>
const char* attributes_of_all(std::vector<Attributes>& kernels, const F& kernel_of) {
  const char* error = nullptr;
  for (const auto& [type, type_name] : {std::pair{Type::float32, " float32"}, std::pair{Type::bfloat16, " bfloat16"},
                                        std::pair{Type::float16, " float16"}})
    for (const int K : {3, 5})
      for (const int stride : {1, 2})
        for (const bool last : {true, false})
          with_kernel<BACKWARD>(Problem{type, last, K, stride, 1, 1, 1, 1, 1, 1}, [&]<class T, class Tile>() {
            kernels.push_back({(BACKWARD ? "bwd" : "fwd") + std::string(type_name) + " k" + std::to_string(K) + " s" +
                                   std::to_string(stride) + (last ? " channels_last" : " nchw"),
                               Tile::THREADS});
            if (!error) error = attributes_of(kernel_of.template operator()<T, Tile>(), kernels.back());
          });
  return error;
}

}  // namespace
}  // namespace fusekern::dw
