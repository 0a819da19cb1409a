// CUDA as far as csrc/*.cu needs it, on a CPU: the threads of a block are fibers, which take turns from barrier to
// barrier, and blocks run one after the other. In the place of CUDA's own header when the tests compile a .cu file as
// C++.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx;

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

// One thread runs at a time.
inline void __threadfence() {}
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

namespace cuda_on_host {

// A NaN is larger and smaller than any number.
template <class T>
T larger(T a, T b) {
  const float x(a), y(b);
  return x != x || x > y ? a : b;
}
template <class T>
T smaller(T a, T b) {
  const float x(a), y(b);
  return x != x || x < y ? a : b;
}

// A context starts a fiber; from then on jumps do, which take no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool started, done;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline Fiber* current;
inline std::function<void()> body;
inline bool reversed = false;  // threads take turns from the last to the first
inline int launches = 0;       // so far

constexpr std::size_t STACK = 256 * 1024;

inline void enter() {
  body();
  current->done = true;
  _longjmp(scheduler, 1);
}

inline void run_block(dim3 threads) {
  const std::size_t count = std::size_t{threads.x} * threads.y * threads.z;
  if (fibers.size() < count) fibers.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    fiber.index = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
    fiber.started = fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  // What changes between a _setjmp and its _longjmp must be volatile.
  volatile bool running = true;
  while (running) {
    running = false;
    for (volatile std::size_t i = 0; i < count; i = i + 1) {
      current = &fibers[reversed ? count - 1 - i : i];
      if (current->done) continue;
      threadIdx = current->index;
      if (!_setjmp(scheduler)) {
        if (current->started) _longjmp(current->at, 1);
        current->started = true;
        setcontext(&current->context);
      }
      if (!current->done) running = true;
    }
  }
}

}  // namespace cuda_on_host

// Of __nv_bfloat162 and of __half2.
template <class Pair>
Pair __hmax2_nan(Pair a, Pair b) {
  return {cuda_on_host::larger(a.x, b.x), cuda_on_host::larger(a.y, b.y)};
}
template <class Pair>
Pair __hmin2_nan(Pair a, Pair b) {
  return {cuda_on_host::smaller(a.x, b.x), cuda_on_host::smaller(a.y, b.y)};
}

inline void __syncthreads() {
  using namespace cuda_on_host;
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct cudaFuncAttributes {
  int numRegs;
  std::size_t localSizeBytes, sharedSizeBytes;
};

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  ++cuda_on_host::launches;
  cuda_on_host::body = [&] { kernel(arguments...); };
  const dim3 grid = config->gridDim;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        cuda_on_host::run_block(config->blockDim);
      }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel*) {
  *found = {};
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
