// The depthwise backward of inverted_bottleneck: from dz the gradients d of v1 and of the weight, and the sums of BN1.
#include "bn_relu6_dw.cuh"

namespace fusekern::dw {

namespace {

// The sums of a channel, and what the norm makes of them.
__device__ __forceinline__ void tell(float first, float second, float* sums, const NormBackward& norm, float count,
                                     int channel, int E) {
  sums[channel] = first;
  sums[E + channel] = second;
  store_value(norm.dbias, channel, first);
  if (!norm.coef) return;
  float dweight;
  norm_backward(norm.vectors + channel, second, first * inverse_of(count), second * inverse_of(count),
                value_of(norm.weight, channel, 1.f), norm.eps, norm.batch, norm.coef + channel, &dweight, E);
  store_value(norm.dweight, channel, dweight);
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    bn_relu6_dw_bwd_kernel(const T* __restrict__ dz, const T* __restrict__ y2, const float* __restrict__ coef,
                    const T* __restrict__ y1, const float* __restrict__ affine, const float* __restrict__ mean,
                    const T* __restrict__ weight, T* __restrict__ d, float* __restrict__ partial,
                    T* __restrict__ dweight, float* __restrict__ totals, NormBackward norm, float count,
                    int* __restrict__ arrived, Grid grid) {
  constexpr int K = Tile::K, V = Tile::V, P = Tile::P, SOURCE = Tile::SOURCE_SIZE * sizeof(T);
  constexpr int TILE = Tile::SIZE * sizeof(T);
  constexpr int WEIGHT = Tile::K * Tile::K * Tile::CHANNELS * sizeof(T);
  // A y2 of 16 bits is so coarse that its mean may as well be subtracted beforehand, which saves registers.
  constexpr bool CENTRED = sizeof(T) == 4;
  constexpr int SUMS = Tile::STRIPS / 2 * Tile::LANES * V * Tile::SUMS * sizeof(float);
  __shared__ __align__(16) unsigned char memory[SOURCE + TILE + WEIGHT > SUMS ? SOURCE + TILE + WEIGHT : SUMS];
  T* const source = reinterpret_cast<T*>(memory);
  T* const tile = reinterpret_cast<T*>(memory + SOURCE);  // y1, and in its place d
  T* const weights = reinterpret_cast<T*>(memory + SOURCE + TILE);

  const int E = grid.source.channels, blocks = (E + Tile::CHANNELS - 1) / Tile::CHANNELS;
  const int part = blockIdx.x / blocks, block = blockIdx.x % blocks * Tile::CHANNELS, thread = threadIdx.x;
  const int channel = block + Tile::lane(thread) * V, strip = Tile::strip(thread) * P;
  float taps[K][K][V] = {}, scale[V], shift[V], middle[V], sum[V] = {}, product[V] = {};
  stage_weight<Tile>(weights, weight, block, E);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool known = channel + v < E;
    scale[v] = known ? affine[channel + v] : 0.f;
    shift[v] = known ? affine[static_cast<int64_t>(E) + channel + v] : 0.f;
    middle[v] = known ? mean[channel + v] : 0.f;
  }

  for (int i = part * grid.run; i < min((part + 1) * grid.run, grid.tiles); ++i) {
    const Place at = place_of<Tile>(i, grid.tiles_down, grid.tiles_across);
    const int row = at.row / Tile::S + Tile::START, column = at.column / Tile::S + Tile::START;
    const int64_t start = grid.source.offset(Tile::LAST, at.image, block, row, column);
    const T* const from_dz = dz + start;
    const T* const from_y2 = y2 + start;
    struct Loaded {
      Pack<T, Tile::VECTOR> dz, y2;
    };
    stage<Tile>(
        source, grid.source, block, row, column,
        [&](int c) {
          PerChannel<Tile, 4> numbers(anew(coef), c, E);
          if constexpr (!CENTRED)
#pragma unroll
            for (int n = 0; n < numbers.N; ++n) numbers.values[2][n] -= numbers.values[1][n] * numbers.values[3][n];
          return numbers;
        },
        [&]<bool WIDE>(int offset, int n) {
          return Loaded{load<WIDE, T, Tile::VECTOR>(from_dz + offset, n),
                        load<WIDE, T, Tile::VECTOR>(from_y2 + offset, n)};
        },
        [&](const PerChannel<Tile, 4>& numbers, Loaded loaded, int n) {
          float v[Tile::VECTOR], y[Tile::VECTOR];
          read(loaded.dz.values, v);
          read(loaded.y2.values, y);
#pragma unroll
          for (int i = 0; i < Tile::VECTOR; ++i)
            v[i] = Tile::LAST || i < n ? norm_gradient(v[i], y[i], numbers.get(0, i), numbers.get(1, i),
                                                       numbers.get(2, i), CENTRED ? numbers.get(3, i) : 0.f)
                                       : 0.f;
          round(v, loaded.dz);
          return loaded.dz;
        });
    const int64_t target = grid.target.offset(Tile::LAST, at.image, block, at.row, at.column);
    const T* const from = y1 + target;
    for_vectors<Tile>(
        grid.target, block, at.row, at.column,
        [&]<bool WIDE>(int place, int offset, int n) {
          *reinterpret_cast<Pack<T, Tile::VECTOR>*>(tile + place) = load<WIDE, T, Tile::VECTOR>(from + offset, n);
        },
        [&](int place) { *reinterpret_cast<Pack<T, Tile::VECTOR>*>(tile + place) = {}; });
    __syncthreads();
    const int rows = grid.target.rows - at.row, columns = grid.target.columns - at.column - strip;
    float w[Tile::K][Tile::K][V];
    read_weight<Tile>(weights, w);
    T* const mine = tile + Tile::offset(thread);
    differentiate<Tile>(
        source + Tile::source_offset(thread), w, taps,
        [&](int row, float(&a)[P][V]) {
#pragma unroll
          for (int p = 0; p < P; ++p) {
            read(mine + row * Tile::ROW + p * Tile::COLUMN, a[p]);
#pragma unroll
            for (int v = 0; v < V; ++v)
              a[p][v] = row < rows && p < columns ? relu6(scale[v] * a[p][v] + shift[v]) : 0.f;
          }
        },
        // Beyond the map a is 0: no gradient passes, and nothing is added.
        [&](int row, float(&g)[P][V], const float(&a)[P][V]) {
#pragma unroll
          for (int p = 0; p < P; ++p) {
            float y[V];
            read(mine + row * Tile::ROW + p * Tile::COLUMN, y);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              g[p][v] = passes(a[p][v]) ? g[p][v] : 0.f;
              sum[v] += g[p][v];
              product[v] += g[p][v] * (y[v] - middle[v]);
            }
            write(mine + row * Tile::ROW + p * Tile::COLUMN, g[p]);
          }
        });
    __syncthreads();
    T* const to = d + target;
    for_vectors<Tile>(
        grid.target, block, at.row, at.column,
        [&]<bool WIDE>(int place, int offset, int n) {
          store<WIDE>(to + offset, *reinterpret_cast<const Pack<T, Tile::VECTOR>*>(tile + place), n);
        },
        [](int) {});
    // No barrier: the next tile's vectors take the places that the same threads have just read.
  }

  float* const sums = reinterpret_cast<float*>(memory);
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int k = 0; k < K * K; ++k) f(k, v, taps[k / K][k % K][v]);
      f(K * K, v, sum[v]);
      f(K * K + 1, v, product[v]);
    }
  };
#pragma unroll 1
  for (int half = Tile::STRIPS / 2; half > 0; half /= 2) {
    float* const place = sums + ((Tile::strip(thread) % half) * Tile::SUMS * Tile::LANES + Tile::lane(thread)) * V;
    __syncthreads();
    if (Tile::strip(thread) >= half && Tile::strip(thread) < 2 * half)
      each([&](int k, int v, float& value) { place[k * Tile::LANES * V + v] = value; });
    __syncthreads();
    if (Tile::strip(thread) < half)
      each([&](int k, int v, float& value) { value += place[k * Tile::LANES * V + v]; });
  }
  if (Tile::strip(thread) == 0)
    each([&](int k, int v, float& value) {
      if (channel + v < E) partial[(static_cast<int64_t>(part) * Tile::SUMS + k) * E + channel + v] = value;
    });
  if (!arrived || !last_to_arrive(arrived + blockIdx.x % blocks, parts_of(grid))) return;
#pragma unroll 1
  for (int i = thread; i < Tile::SUMS * Tile::CHANNELS; i += Tile::THREADS) {
    const int k = i / Tile::CHANNELS, c = block + i % Tile::CHANNELS;
    if (c >= E) continue;
    float total = 0.f;
#pragma unroll 16
    for (int i = 0; i < parts_of(grid); ++i)
      total += __ldcg(partial + (static_cast<int64_t>(i) * Tile::SUMS + k) * E + c);
    if (k < K * K)
      dweight[static_cast<int64_t>(c) * (K * K) + k] = static_cast<T>(total);
    else
      sums[(k - K * K) * Tile::CHANNELS + c - block] = total;
  }
  __syncthreads();
  if (thread < Tile::CHANNELS && block + thread < E)
    tell(sums[thread], sums[Tile::CHANNELS + thread], totals, norm, count, block + thread, E);
}

// The sum of a row of the parts, for the first of the threads that share a channel.
__device__ __forceinline__ float sum_of(const float* __restrict__ partial, float (&shared)[WIDE][WIDE], int channel,
                                        int share, int k, int parts, int rows, int E) {
  float mine = 0.f;
  if (channel < E) {
#pragma unroll 8
    for (int i = share; i < parts; i += WIDE) mine += partial[(static_cast<int64_t>(i) * rows + k) * E + channel];
  }
  for (int half = WIDE / 2; half > 0; half /= 2) {
    shared[share][threadIdx.x] = mine;
    __syncthreads();
    if (share < half) mine += shared[share + half][threadIdx.x];
    __syncthreads();
  }
  return mine;
}

// Row k of the sums is the gradient of tap k, but for the last two: one block has both, and makes the norm's coef.
template <class T>
__global__ void __launch_bounds__(WIDE* WIDE)
    bn_relu6_dw_sums_kernel(const float* __restrict__ partial, T* __restrict__ dweight, float* __restrict__ sums,
                            NormBackward norm, float count, int parts, int rows, int E) {
  __shared__ float shared[WIDE][WIDE];
  const int channel = blockIdx.x * WIDE + threadIdx.x, share = threadIdx.y, k = blockIdx.y, taps = rows - 2;
  const float first = sum_of(partial, shared, channel, share, k, parts, rows, E);
  if (k < taps) {
    if (share == 0 && channel < E) dweight[static_cast<int64_t>(channel) * taps + k] = static_cast<T>(first);
    return;
  }
  const float second = sum_of(partial, shared, channel, share, k + 1, parts, rows, E);
  if (share == 0 && channel < E) tell(first, second, sums, norm, count, channel, E);
}

}  // namespace

int backward_parts(const Problem& problem) { return parts_of_problem<true>(problem); }

const char* launch(const Problem& problem, const Backward& t, void* stream) {
  return with_kernel<true>(problem, [&]<class T, class Tile>() -> const char* {
    Grid grid = grid_of<Tile>(problem);
    grid.source.wide &= aligned({t.dz, t.y2});
    grid.target.wide &= aligned({t.y1, t.d});
    const auto read = [](const void* pointer) { return static_cast<const T*>(pointer); };
    const float count = static_cast<float>(static_cast<int64_t>(problem.B) * problem.H * problem.W);
    if (const char* error = start(bn_relu6_dw_bwd_kernel<T, Tile>, blocks_of<Tile>(problem, grid), Tile::THREADS,
                                  stream, read(t.dz), read(t.y2), t.coef, read(t.y1), t.affine, t.mean, read(t.weight),
                                  static_cast<T*>(t.d), t.partial, static_cast<T*>(t.dweight), t.sums, t.norm, count,
                                  t.arrived, grid))
      return error;
    if (t.arrived) return nullptr;
    return start(bn_relu6_dw_sums_kernel<T>, dim3((problem.E + WIDE - 1) / WIDE, Tile::SUMS - 1), dim3(WIDE, WIDE),
                 stream, t.partial, static_cast<T*>(t.dweight), t.sums, t.norm, count, parts_of(grid), Tile::SUMS,
                 problem.E);
  });
}

const char* backward_attributes(std::vector<Attributes>& kernels) {
  const char* error =
      attributes_of_all<true>(kernels, [&]<class T, class Tile>() { return bn_relu6_dw_bwd_kernel<T, Tile>; });
  const auto add = [&](const char* name, auto* kernel) {
    kernels.push_back({name, WIDE * WIDE});
    if (!error) error = attributes_of(kernel, kernels.back());
  };
  add("bwd sums float32", bn_relu6_dw_sums_kernel<float>);
  add("bwd sums bfloat16", bn_relu6_dw_sums_kernel<__nv_bfloat16>);
  add("bwd sums float16", bn_relu6_dw_sums_kernel<__half>);
  return error;
}

}  // namespace fusekern::dw
