// The depthwise forward of inverted_bottleneck: y2 = Wd * relu6(BN1(y1)), with the statistics of y2.
#include "bn_relu6_dw.cuh"

namespace fusekern::dw {

namespace {

// What is wanted of a channel's moments.
__device__ __forceinline__ void tell(const Moments& seen, float* stats, const NormForward& norm, int channel, int E) {
  if (stats) {
    stats[channel] = seen.mean;
    stats[E + channel] = seen.m2;
  }
  if (norm.vectors) norm_forward(seen, norm, channel, norm.vectors + channel, E);
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    bn_relu6_dw_fwd_kernel(const T* __restrict__ y1, const float* __restrict__ affine, const T* __restrict__ weight,
                   T* __restrict__ y2, float* __restrict__ partial, float* __restrict__ stats, NormForward norm,
                   int* __restrict__ arrived, Before before, Grid grid) {
  constexpr int V = Tile::V, P = Tile::P, SOURCE = Tile::SOURCE_SIZE * sizeof(T), TILE = Tile::SIZE * sizeof(T);
  constexpr int WEIGHT = Tile::K * Tile::K * Tile::CHANNELS * sizeof(T);
  static_assert(SOURCE % 16 == 0 && Tile::STRIPS / 2 * Tile::LANES * V * 3 * sizeof(float) <= SOURCE);
  __shared__ __align__(16) unsigned char memory[SOURCE + TILE + WEIGHT];
  __shared__ __align__(16) float scale_and_shift[2][Tile::CHANNELS];
  T* const source = reinterpret_cast<T*>(memory);
  T* const tile = reinterpret_cast<T*>(memory + SOURCE);
  T* const weights = reinterpret_cast<T*>(memory + SOURCE + TILE);

  const int E = grid.source.channels, blocks = (E + Tile::CHANNELS - 1) / Tile::CHANNELS;
  const int part = blockIdx.x / blocks, block = blockIdx.x % blocks * Tile::CHANNELS, thread = threadIdx.x;
  const int channel = block + Tile::lane(thread) * V, strip = Tile::strip(thread) * P;
  stage_weight<Tile>(weights, weight, block, E);
  const bool activate = affine || before.partial;
  if (before.partial) {
    const int tiles = (before.size + before.pixels - 1) / before.pixels;
    const Moments seen = join_parts<Tile>(
        reinterpret_cast<Moments*>(memory), block, before.parts, E, [&](int i, int channel) -> Moments {
          const float* const row = before.partial + static_cast<int64_t>(i) * 2 * E + channel;
          const int count = min(before.pixels, before.size - i % tiles * before.pixels);
          return {static_cast<float>(count), row[0], row[E]};
        });
    if (thread < Tile::CHANNELS) {
      float vectors[5] = {};
      if (block + thread < E) norm_forward(seen, before.norm, block + thread, vectors, 1);
      scale_and_shift[0][thread] = vectors[0];
      scale_and_shift[1][thread] = vectors[1];
      if (part == 0 && block + thread < E)
#pragma unroll
        for (int row = 0; row < 5; ++row)
          before.norm.vectors[static_cast<int64_t>(row) * E + block + thread] = vectors[row];
    }
  } else if (affine) {
    for (int c = thread; c < Tile::CHANNELS; c += Tile::THREADS)
#pragma unroll
      for (int row = 0; row < 2; ++row)
        scale_and_shift[row][c] = block + c < E ? affine[static_cast<int64_t>(row) * E + block + c] : 0.f;
  }
  __syncthreads();
  Shifted sums[V];
  int count = 0;

  for (int i = part * grid.run; i < min((part + 1) * grid.run, grid.tiles); ++i) {
    const Place at = place_of<Tile>(i, grid.tiles_down, grid.tiles_across);
    const int row = at.row * Tile::S + Tile::START, column = at.column * Tile::S + Tile::START;
    const T* const from = y1 + grid.source.offset(Tile::LAST, at.image, block, row, column);
    stage<Tile>(
        source, grid.source, block, row, column,
        [&](int c) { return PerChannel<Tile, 2>(scale_and_shift[0], c - block, Tile::CHANNELS); },
        [&]<bool WIDE>(int offset, int n) { return load<WIDE, T, Tile::VECTOR>(from + offset, n); },
        [&](const PerChannel<Tile, 2>& numbers, Pack<T, Tile::VECTOR> pack, int n) {
          if (activate) {
            float v[Tile::VECTOR];
            read(pack.values, v);
#pragma unroll
            for (int i = 0; i < Tile::VECTOR; ++i)
              v[i] = Tile::LAST || i < n ? numbers.get(0, i) * v[i] + numbers.get(1, i) : 0.f;
            round(v, pack);
            relu6(pack);
          }
          return pack;
        });
    __syncthreads();
    const int rows = grid.target.rows - at.row, columns = grid.target.columns - at.column - strip;
    float w[Tile::K][Tile::K][V];
    read_weight<Tile>(weights, w);
    convolve<Tile>(source + Tile::source_offset(thread), w, [&](int row, const float(&y)[P][V]) {
#pragma unroll
      for (int p = 0; p < P; ++p) write(tile + Tile::offset(thread) + row * Tile::ROW + p * Tile::COLUMN, y[p]);
      if (row < rows) {
#pragma unroll
        for (int p = 0; p < P; ++p)
          if (p < columns) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              if (row == 0 && p == 0 && count == 0) sums[v].shift = y[p][v];
              sums[v].add(y[p][v]);
            }
          }
      }
    });
    count += max(0, min(P, columns)) * min(Tile::ROWS, rows);
    __syncthreads();
    T* const to = y2 + grid.target.offset(Tile::LAST, at.image, block, at.row, at.column);
    for_vectors<Tile>(
        grid.target, block, at.row, at.column,
        [&]<bool WIDE>(int place, int offset, int n) {
          store<WIDE>(to + offset, *reinterpret_cast<const Pack<T, Tile::VECTOR>*>(tile + place), n);
        },
        [](int) {});
  }
  if (!partial) return;

  // The strips' moments, halves of the strips onto the other halves. The first barrier also ends the last tile.
  float* const moments = reinterpret_cast<float*>(memory);
  Moments mine[V];
#pragma unroll
  for (int v = 0; v < V; ++v) mine[v] = sums[v].moments(static_cast<float>(count));
#pragma unroll 1
  for (int half = Tile::STRIPS / 2; half > 0; half /= 2) {
    const int place = ((Tile::strip(thread) % half) * Tile::LANES + Tile::lane(thread)) * V;
    __syncthreads();
    if (Tile::strip(thread) >= half && Tile::strip(thread) < 2 * half) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        moments[3 * (place + v)] = mine[v].count;
        moments[3 * (place + v) + 1] = mine[v].mean;
        moments[3 * (place + v) + 2] = mine[v].m2;
      }
    }
    __syncthreads();
    if (Tile::strip(thread) < half) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float* const other = moments + 3 * (place + v);
        mine[v] = merge(mine[v], {other[0], other[1], other[2]});
      }
    }
  }
  if (Tile::strip(thread) == 0) {
    float* const row = partial + static_cast<int64_t>(part) * 3 * E;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (channel + v < E) {
        row[channel + v] = mine[v].count;
        row[static_cast<int64_t>(E) + channel + v] = mine[v].mean;
        row[2 * static_cast<int64_t>(E) + channel + v] = mine[v].m2;
      }
  }
  if (!arrived || !last_to_arrive(arrived + blockIdx.x % blocks, parts_of(grid))) return;
  const Moments seen = join_parts<Tile>(
      reinterpret_cast<Moments*>(memory), block, parts_of(grid), E, [&](int i, int channel) -> Moments {
        const float* const row = partial + static_cast<int64_t>(i) * 3 * E + channel;
        return {__ldcg(row), __ldcg(row + E), __ldcg(row + 2 * static_cast<int64_t>(E))};
      });
  if (thread < Tile::CHANNELS && block + thread < E) tell(seen, stats, norm, block + thread, E);
}

// Of the parts' moments, and what the norm makes of them.
__global__ void __launch_bounds__(WIDE* WIDE)
    bn_relu6_dw_moments_kernel(const float* __restrict__ partial, float* __restrict__ stats, NormForward norm,
                               int parts, int E) {
  __shared__ Moments shared[WIDE][WIDE + 1];
  const int channel = blockIdx.x * WIDE + threadIdx.x, share = threadIdx.y;
  Moments mine{0.f, 0.f, 0.f};
  if (channel < E) {
#pragma unroll 4
    for (int i = share; i < parts; i += WIDE) {
      const float* const row = partial + static_cast<int64_t>(i) * 3 * E + channel;
      mine = merge(mine, {row[0], row[E], row[2 * static_cast<int64_t>(E)]});
    }
  }
  for (int half = WIDE / 2; half > 0; half /= 2) {
    shared[share][threadIdx.x] = mine;
    __syncthreads();
    if (share < half) mine = merge(mine, shared[share + half][threadIdx.x]);
    __syncthreads();
  }
  if (share == 0 && channel < E) tell(mine, stats, norm, channel, E);
}

}  // namespace

int forward_parts(const Problem& problem) { return parts_of_problem<false>(problem); }

const char* launch(const Problem& problem, const Forward& t, void* stream) {
  return with_kernel<false>(problem, [&]<class T, class Tile>() -> const char* {
    Grid grid = grid_of<Tile>(problem);
    grid.source.wide &= aligned({t.y1});
    grid.target.wide &= aligned({t.y2});
    const auto* y1 = static_cast<const T*>(t.y1);
    const auto* weight = static_cast<const T*>(t.weight);
    if (const char* error = start(bn_relu6_dw_fwd_kernel<T, Tile>, blocks_of<Tile>(problem, grid), Tile::THREADS,
                                  stream, y1, t.affine, weight, static_cast<T*>(t.y2), t.partial, t.stats, t.norm,
                                  t.arrived, t.before, grid))
      return error;
    if (!t.partial || t.arrived) return nullptr;
    return start(bn_relu6_dw_moments_kernel, (problem.E + WIDE - 1) / WIDE, dim3(WIDE, WIDE), stream, t.partial,
                 t.stats, t.norm, parts_of(grid), problem.E);
  });
}

const char* forward_attributes(std::vector<Attributes>& kernels) {
  const char* error =
      attributes_of_all<false>(kernels, [&]<class T, class Tile>() { return bn_relu6_dw_fwd_kernel<T, Tile>; });
  kernels.push_back({"fwd moments", WIDE * WIDE});
  return error ? error : attributes_of(bn_relu6_dw_moments_kernel, kernels.back());
}

}  // namespace fusekern::dw
