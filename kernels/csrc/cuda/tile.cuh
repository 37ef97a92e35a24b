// What the scores of attention and Mamba share: samples cut into pieces, and a tile of products of rows with keys.
#pragma once

#ifdef HP_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "device.cuh"
#endif

namespace hybridprune::cuda {

constexpr int kTile = 64;        // rows and keys of a tile
constexpr int kThreads = 256;    // of a block that computes tiles
constexpr int kBlocksAtOnce = 2; // of them at least on a multiprocessor, which leaves a thread 128 registers
constexpr int kStride = kTile + 4;  // of a tile in shared memory: rows and columns are read without bank conflicts
constexpr float kNegInf = -__builtin_huge_valf();
// Of a key that is not there: behind every row.
constexpr int64_t kNowhere = INT64_MAX;

__host__ __device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float exp_of(float value) { return __expf(value); }
__device__ __forceinline__ double exp_of(double value) { return exp(value); }

template <typename value_t>
__device__ __forceinline__ value_t warp_sum(value_t value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <typename value_t>
__device__ __forceinline__ value_t warp_max(value_t value) {
  for (int step = 16; step > 0; step /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// A sample's range [begin, end) cut to at most ``size``. Piece numbers of a sample start at offset / size + sample, which
// leaves room for all pieces of those before it, so that a block finds its piece without a list of them.
struct Piece {
  int64_t sample, begin, end;
};

__device__ __forceinline__ int64_t first_piece(const int64_t* offsets, int64_t sample, int64_t size) {
  return offsets[sample] / size + sample;
}

// False: the number is one of those that are left out.
__device__ inline bool find_piece(const int64_t* offsets, int64_t samples, int64_t size, int64_t number, Piece& piece) {
  int64_t low = 0, high = samples;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_piece(offsets, middle, size) <= number) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (samples == 0) return false;
  piece.sample = low;
  piece.begin = offsets[low] + (number - first_piece(offsets, low, size)) * size;
  piece.end = smaller(piece.begin + size, offsets[low + 1]);
  return piece.begin < piece.end;
}

// What a tile's rows and keys are, in shared memory.
template <typename T>
struct TileSides {
  const T *row_start[kTile], *key_start[kTile];    // the vectors that are multiplied; null: zeros
  int64_t row_position[kTile], key_position[kTile];
  float row_sum[kTile];                            // log-sum of a row
  bool always_seen[kTile];                         // whether a key is seen by rows in front of it

  __device__ bool seen(int row, int key) const {
    return key_position[key] <= row_position[row] || always_seen[key];
  }
};

// Shared memory of a tile: its sides, parts of the vectors that are multiplied, and the products.
template <typename T>
struct TileMemory;

template <>
struct TileMemory<float> : TileSides<float> {
  static constexpr int depth = 32;
  // By depth first, so that a thread reads neighbours.
  float rows[depth][kStride], keys[depth][kStride];
  float products[kTile][kStride];
};

template <>
struct TileMemory<__nv_bfloat16> : TileSides<__nv_bfloat16> {
  static constexpr int depth = 64;
  // 8 more than the depth: the pairs that a warp's lanes read lie in different banks.
  alignas(16) __nv_bfloat16 rows[kTile][depth + 8];
  alignas(16) __nv_bfloat16 keys[kTile][depth + 8];
  float products[kTile][kStride];
};

// For products of float32 or bfloat16 vectors in float64.
template <typename T>
struct WideTile : TileSides<T> {
  static constexpr int depth = 16;
  float rows[depth][kStride], keys[depth][kStride];
  double products[kTile][kTile + 2];
};

// Products in value_t, each the sum of its terms in their order; see multiply_tile.
template <typename value_t, typename Memory>
__device__ __forceinline__ void multiply_in_order(Memory& memory, int width) {
  constexpr int depth = Memory::depth;
  const int tid = threadIdx.x, top = tid / 16 * 4, left = tid % 16 * 4;
  value_t sums[4][4] = {};
  for (int start = 0; start < width; start += depth) {
    __syncthreads();
    for (int i = tid; i < kTile * depth; i += kThreads) {
      const int vector = i / depth, n = i % depth;
      const auto *row = memory.row_start[vector], *key = memory.key_start[vector];
      memory.rows[n][vector] = row != nullptr && start + n < width ? as_float(row[start + n]) : 0.0f;
      memory.keys[n][vector] = key != nullptr && start + n < width ? as_float(key[start + n]) : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int n = 0; n < depth; ++n) {
      value_t row[4], key[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row[i] = memory.rows[n][top + i];
        key[i] = memory.keys[n][left + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += row[i] * key[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) memory.products[top + i][left + j] = sums[i][j];
  }
  __syncthreads();
}

// memory.products[i][j] = row i . key j, the same wherever both lie in their tiles. All threads of the block call it; it
// begins and ends with a barrier, so sides may be written before it and products read after it.
__device__ inline void multiply_tile(TileMemory<float>& memory, int width) { multiply_in_order<float>(memory, width); }

template <typename T>
__device__ inline void multiply_tile(WideTile<T>& memory, int width) {
  multiply_in_order<double>(memory, width);
}

// Eight bfloat16 of a vector from ``at`` on, zeros behind its end; one load where the vector allows it.
__device__ __forceinline__ uint4 load_eight(const __nv_bfloat16* vector, int at, int width) {
  uint4 out = {0u, 0u, 0u, 0u};
  if (vector == nullptr || at >= width) return out;
  if (width % 8 == 0) return vector_at<uint4>(vector + at);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(vector + at);
  const int left = width - at;
  // Pairs, the first in the lower half.
  out.x = bits[0] | (left > 1 ? static_cast<uint32_t>(bits[1]) << 16 : 0u);
  out.y = (left > 2 ? bits[2] : 0u) | (left > 3 ? static_cast<uint32_t>(bits[3]) << 16 : 0u);
  out.z = (left > 4 ? bits[4] : 0u) | (left > 5 ? static_cast<uint32_t>(bits[5]) << 16 : 0u);
  out.w = (left > 6 ? bits[6] : 0u) | (left > 7 ? static_cast<uint32_t>(bits[7]) << 16 : 0u);
  return out;
}

__device__ __forceinline__ uint32_t pair(const __nv_bfloat16* at) { return vector_at<uint32_t>(at); }

__device__ inline void multiply_tile(TileMemory<__nv_bfloat16>& memory, int width) {
  constexpr int depth = TileMemory<__nv_bfloat16>::depth;
  const int tid = threadIdx.x, warp = tid / 32, g = tid % 32 / 4, t = tid % 4;
  // Every warp has 16 rows and 32 keys.
  const int top = warp % 4 * 16, left = warp / 4 * 32;
  float sums[4][4] = {};
  for (int start = 0; start < width; start += depth) {
    __syncthreads();
    for (int i = tid; i < kTile * (depth / 8); i += kThreads) {
      const int vector = i / (depth / 8), n = i % (depth / 8) * 8;
      vector_at<uint4>(&memory.rows[vector][n]) = load_eight(memory.row_start[vector], start + n, width);
      vector_at<uint4>(&memory.keys[vector][n]) = load_eight(memory.key_start[vector], start + n, width);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < depth; n += 16) {
      const __nv_bfloat16 *upper = &memory.rows[top + g][n + 2 * t], *lower = &memory.rows[top + g + 8][n + 2 * t];
      const uint32_t a[4] = {pair(upper), pair(lower), pair(upper + 8), pair(lower + 8)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __nv_bfloat16* key = &memory.keys[left + 8 * j + g][n + 2 * t];
        const uint32_t b[2] = {pair(key), pair(key + 8)};
        mma_16x8x16(sums[j], a, b);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float *upper = &memory.products[top + g][left + 8 * j + 2 * t], *lower = upper + 8 * kStride;
    upper[0] = sums[j][0];
    upper[1] = sums[j][1];
    lower[0] = sums[j][2];
    lower[1] = sums[j][3];
  }
  __syncthreads();
}

// The largest logit of a row so far, and the sum of exp(logit - largest).
template <typename value_t>
struct RowSum {
  value_t best, sum;
};

// Joins one row's logits, a quarter of them in each of four neighbouring lanes, with what it has so far. ``logit(c)`` is
// the lane's c-th of kTile / 4; -inf: not seen. Returns in all four lanes the new pair.
template <typename value_t, typename Logit>
__device__ __forceinline__ RowSum<value_t> join_row(RowSum<value_t> so_far, const Logit& logit) {
  value_t best = so_far.best;
#pragma unroll 4
  for (int c = 0; c < kTile / 4; ++c) best = larger(best, logit(c));
  best = larger(best, __shfl_xor_sync(kAllLanes, best, 1));
  best = larger(best, __shfl_xor_sync(kAllLanes, best, 2));
  // Nothing seen so far: exp(-inf + inf) would be NaN.
  const value_t shift = best == kNegInf ? 0 : best;
  value_t sum = 0;
#pragma unroll 4
  for (int c = 0; c < kTile / 4; ++c) sum += exp_of(logit(c) - shift);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  return {best, sum + so_far.sum * exp_of(so_far.best - shift)};
}

// log_sum [T, H] from the partial maxima and sums [2, pieces, T * H] of a sample's pieces of keys.
template <typename value_t>
static __global__ void join_pieces(const value_t* partial, const int64_t* query_offsets, const int64_t* key_offsets,
                                   int64_t queries, int64_t samples, int64_t size, int64_t pieces, int heads,
                                   value_t* log_sum) {
  const int64_t rows = queries * heads, row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  int64_t sample = 0;
  while (query_offsets[sample + 1] <= row / heads) ++sample;
  const int64_t first = first_piece(key_offsets, sample, size);
  const int64_t count = (key_offsets[sample + 1] - key_offsets[sample] + size - 1) / size;
  const value_t *best = partial + first * rows + row, *sum = best + pieces * rows;
  value_t high = kNegInf, total = 0;
  for (int64_t i = 0; i < count; ++i) high = larger(high, best[i * rows]);
  for (int64_t i = 0; i < count; ++i) {
    if (best[i * rows] != kNegInf) total += sum[i * rows] * exp(best[i * rows] - high);
  }
  log_sum[row] = high == kNegInf ? kNegInf : high + log(total);
}

}  // namespace hybridprune::cuda
