// Implicit attention of a Mamba-2 layer: one pass over B where the mean of C suffices, tiles of products elsewhere.
#include <type_traits>

#include "../names.h"
#include "kernels.h"
#include "tile.cuh"

namespace hybridprune::cuda {
namespace {

// Identity without decay, and everything with decay, is summed in float64 and rounded at the end, so that plain torch
// comes to the same bits: one pass waits for B anyway, and decays span hundreds of orders of magnitude.

// mean_c [samples, G * N]: the mean of C over a sample's query rows. Grid: channels / 256, samples.
template <typename T>
__global__ void __launch_bounds__(kThreads) mean_rows_kernel(MambaInputs in, float* mean_c) {
  const int size = in.groups * in.width, channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= size) return;
  const int64_t first = in.query_offsets[blockIdx.y], last = in.query_offsets[blockIdx.y + 1];
  double sum = 0;
  for (int64_t i = first; i < last; ++i) {
    sum += as_float(static_cast<const T*>(in.C)[in.query_index[i] * size + channel]);
  }
  mean_c[static_cast<int64_t>(blockIdx.y) * size + channel] = static_cast<float>(sum / static_cast<double>(last - first));
}

// Four neighbours at once; their addresses divide by four elements.
__device__ __forceinline__ float4 load_four(const float* at) { return vector_at<float4>(at); }
__device__ __forceinline__ float4 load_four(const __nv_bfloat16* at) {
  const uint2 bits = vector_at<uint2>(at);
  // A bfloat16 is the upper half of a float32.
  return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xFFFF0000u), __uint_as_float(bits.y << 16),
          __uint_as_float(bits.y & 0xFFFF0000u)};
}

// This lane's part of b . c.
template <typename T>
__device__ __forceinline__ double lane_product(const T* b, const float* c, int width, int lane) {
  double sum = 0;
  if (width % 4 == 0) {
    // The groups are what is unrolled: their loads are under way together.
#pragma unroll 1
    for (int n = 4 * lane; n < width; n += 128) {
      const float4 x = load_four(b + n), y = load_four(c + n);
      const float terms[4] = {x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += terms[i];
    }
    return sum;
  }
#pragma unroll 1
  for (int n = lane; n < width; n += 32) sum += as_float(b[n]) * c[n];
  return sum;
}

// The moments of scores over one share of a sample's visual tokens, for the heads of one group: sums of differences from
// the sample's first token, as in plain torch, and of their squares. Grid: shares, groups.
constexpr int kLanes = 16;  // heads at once, and tokens at once: kThreads is their product
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    moments_kernel(MambaInputs in, int64_t size, const float* mean_c, double* partial) {
  static_assert(kLanes * kLanes == kThreads);
  // Products of the tokens of a tile with the mean of C, and of the first token.
  __shared__ double products[kTile + 1];
  __shared__ int64_t tokens[kTile + 1];
  __shared__ double totals[kLanes][kLanes], squares[kLanes][kLanes];
  Piece piece;
  if (!find_piece(in.visual_offsets, in.samples, size, blockIdx.x, piece)) return;
  const int group = blockIdx.y, heads_of_group = in.heads / in.groups, width = in.width;
  const int lane = threadIdx.x % 32, row = threadIdx.x / kLanes, column = threadIdx.x % kLanes;
  const float* c = mean_c + (piece.sample * in.groups + group) * width;
  double* out = partial + (static_cast<int64_t>(blockIdx.x) * 2 * in.groups + group) * heads_of_group;
  for (int64_t start = piece.begin; start < piece.end; start += kTile) {
    const int count = static_cast<int>(smaller(kTile, piece.end - start));
    for (int j = threadIdx.x / 32; j <= count; j += kThreads / 32) {
      const int64_t token = in.visual_index[j < count ? start + j : in.visual_offsets[piece.sample]];
      const int slot = j < count ? j : kTile;
      const T* b = static_cast<const T*>(in.B) + (token * in.groups + group) * width;
      const double product = warp_sum(lane_product(b, c, width, lane));
      if (lane == 0) {
        products[slot] = product;
        tokens[slot] = token;
      }
    }
    __syncthreads();
    for (int left = 0; left < heads_of_group; left += kLanes) {
      const int r = left + column;
      double total = 0, square = 0;
      if (r < heads_of_group) {
        const auto score = [&](int slot) {
          const int64_t head = tokens[slot] * in.heads + group * heads_of_group + r;
          return products[slot] * (in.dt != nullptr ? in.dt[head] : 1.0f);
        };
        const double first = score(kTile);
        for (int j = row; j < count; j += kLanes) {
          const double gap = score(j) - first;
          total += gap;
          square += gap * gap;
        }
      }
      totals[row][column] = total;
      squares[row][column] = square;
      __syncthreads();
      if (row < 2 && r < heads_of_group) {
        const auto& part = row == 0 ? totals : squares;
        double sum = start == piece.begin ? 0.0 : out[row * in.heads + r];
        for (int i = 0; i < kLanes; ++i) sum += part[i][column];
        // This thread alone writes here, so it may add tile after tile.
        out[row * in.heads + r] = sum;
      }
      // All have read this tile, and what its rows came to.
      __syncthreads();
    }
  }
}

// Grid: samples, heads / 256.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    join_moments(MambaInputs in, int64_t size, const float* mean_c, const double* partial, Moments moments) {
  const int64_t sample = blockIdx.x, begin = in.visual_offsets[sample], end = in.visual_offsets[sample + 1];
  const int head = blockIdx.y * kThreads + threadIdx.x, group = head / (in.heads / in.groups);
  if (head >= in.heads || begin == end) return;
  const int64_t first_share = first_piece(in.visual_offsets, sample, size), shares = (end - begin + size - 1) / size;
  double total = 0, squares = 0;
  for (int64_t i = 0; i < shares; ++i) {
    const double* sums = partial + (first_share + i) * 2 * in.heads + head;
    total += sums[0];
    squares += sums[in.heads];
  }
  const int64_t token = in.visual_index[begin];
  const T* b = static_cast<const T*>(in.B) + (token * in.groups + group) * in.width;
  const float* c = mean_c + (sample * in.groups + group) * in.width;
  double first = 0;
  for (int n = 0; n < in.width; ++n) first += as_float(b[n]) * c[n];
  if (in.dt != nullptr) first *= in.dt[token * in.heads + head];
  const double count = static_cast<double>(end - begin), mean = total / count, variance = squares / count - mean * mean;
  moments.centre[sample * in.heads + head] = first + mean;
  // A head that scores all tokens alike says 0 of each.
  moments.scale[sample * in.heads + head] = variance > 0 ? 1 / sqrt(variance) : 0;
}

constexpr int kGroupsAtOnce = 4;
constexpr int kTokensPerBlock = 64;  // eight for each warp

// Scores of 64 visual tokens of a sample, one warp a token. Grid: pieces of visual tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) one_pass_kernel(MambaInputs in, const float* mean_c, Moments moments, float* scores) {
  Piece piece;
  if (!find_piece(in.visual_offsets, in.samples, kTokensPerBlock, blockIdx.x, piece)) return;
  const int lane = threadIdx.x % 32, size = in.groups * in.width, heads_of_group = in.heads / in.groups;
  const float* c = mean_c + piece.sample * size;
  for (int64_t v = piece.begin + threadIdx.x / 32; v < piece.end; v += kThreads / 32) {
    const int64_t token = in.visual_index[v];
    const T* b = static_cast<const T*>(in.B) + token * size;
    double best = kNegInf, sum = 0;
    for (int group = 0; group < in.groups; group += kGroupsAtOnce) {
      double products[kGroupsAtOnce];
#pragma unroll
      for (int g = 0; g < kGroupsAtOnce; ++g) {
        const int offset = (group + g) * in.width;
        products[g] = group + g < in.groups ? lane_product(b + offset, c + offset, in.width, lane) : 0.0;
      }
#pragma unroll
      for (int g = 0; g < kGroupsAtOnce; ++g) {
        if (group + g >= in.groups) break;
        const double product = warp_sum(products[g]);
        // Without moments the product weighs all heads of the group alike, and their steps are summed alone.
        double in_group = 0;
        for (int r = lane; r < heads_of_group; r += 32) {
          const int head = (group + g) * heads_of_group + r;
          const float step = in.dt != nullptr ? in.dt[token * in.heads + head] : 1.0f;
          double value = product * step;
          if (moments.scale != nullptr) {
            const int64_t at = piece.sample * in.heads + head;
            value = fabs(value - moments.centre[at]) * moments.scale[at];
          }
          in_group += moments.scale != nullptr ? value : step;
          if (in.pooling == static_cast<int>(Pooling::kMaxHeads)) best = larger(best, value);
        }
        const double factor = moments.scale != nullptr ? 1.0 : product;
        if (in.pooling == static_cast<int>(Pooling::kMaxGroups)) {
          best = larger(best, factor * warp_sum(in_group) / static_cast<double>(heads_of_group));
        }
        sum += factor * in_group;
      }
    }
    const double score = in.pooling == static_cast<int>(Pooling::kMean) ? warp_sum(sum) / static_cast<double>(in.heads)
                                                                         : warp_max(best);
    if (lane == 0) scores[v] = static_cast<float>(score);
  }
}

// One group's tiles of one sample: rows are query rows, keys visual tokens, positions those in the packed sequence.
template <typename T>
struct Tiles {
  const MambaInputs& in;
  int group, heads_of_group, rows;
  int64_t first_query;

  __device__ Tiles(const MambaInputs& inputs, int64_t sample, int group_)
      : in(inputs), group(group_), heads_of_group(inputs.heads / inputs.groups),
        rows(static_cast<int>(inputs.query_offsets[sample + 1] - inputs.query_offsets[sample])),
        first_query(inputs.query_offsets[sample]) {}

  // The first kTile threads tell what the tile's rows are, the next its keys.
  __device__ void set_sides(TileSides<T>& memory, int row, int64_t key, int64_t end) const {
    const int64_t stride = static_cast<int64_t>(in.groups) * in.width, offset = static_cast<int64_t>(group) * in.width;
    if (threadIdx.x < kTile) {
      const int i = threadIdx.x;
      const int64_t token = row + i < rows ? in.query_index[first_query + row + i] : -1;
      memory.row_start[i] = token >= 0 ? static_cast<const T*>(in.C) + token * stride + offset : nullptr;
      memory.row_position[i] = token;
    } else if (threadIdx.x < 2 * kTile) {
      const int j = threadIdx.x - kTile;
      const bool inside = key + j < end;
      const int64_t token = inside ? in.visual_index[key + j] : 0;
      memory.key_start[j] = inside ? static_cast<const T*>(in.B) + token * stride + offset : nullptr;
      memory.key_position[j] = inside ? token : kNowhere;
      // Without decay there is no order.
      memory.always_seen[j] = inside && in.log_decay == nullptr;
    }
  }

  __device__ int64_t head(int r) const { return static_cast<int64_t>(group) * heads_of_group + r; }
  __device__ float step(int64_t token, int r) const {
    return in.dt != nullptr ? in.dt[token * in.heads + head(r)] : 1.0f;
  }
  __device__ double log_decay(int64_t token, int r) const { return in.log_decay[token * in.heads + head(r)]; }
  // From a token to the row that has the given running sum.
  __device__ double decay(double own, int64_t token, int r) const { return exp(own - log_decay(token, r)); }
};

template <typename value_t>
__device__ __forceinline__ value_t apply(int function, value_t value) {
  if (function == static_cast<int>(Function::kAbs)) return value < 0 ? -value : value;
  if (function == static_cast<int>(Function::kRelu)) return value < 0 ? 0 : value;
  return value;
}

// Tiles of products in value_t: double with decay, else float.
template <typename value_t>
constexpr bool kWide = std::is_same_v<value_t, double>;
template <typename T, typename value_t>
using MemoryFor = std::conditional_t<kWide<value_t>, WideTile<T>, TileMemory<T>>;

// Maximum and sum of every row and head over one share of visual tokens. Grid: shares, groups.
template <typename T, typename value_t>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    log_sum_kernel(MambaInputs in, int64_t size, int64_t pieces, value_t* partial) {
  __shared__ MemoryFor<T, value_t> memory;
  Piece piece;
  if (!find_piece(in.visual_offsets, in.samples, size, blockIdx.x, piece)) return;
  const Tiles<T> tiles(in, piece.sample, blockIdx.y);
  const int i = threadIdx.x / 4, quarter = threadIdx.x % 4;
  const int64_t all_rows = in.queries * in.heads;
  for (int row = 0; row < tiles.rows; row += kTile) {
    const bool inside = row + i < tiles.rows;
    value_t* out = partial + blockIdx.x * all_rows + (tiles.first_query + row + i) * in.heads;
    for (int64_t key = piece.begin; key < piece.end; key += kTile) {
      // All have read the tile before this one.
      __syncthreads();
      tiles.set_sides(memory, row, key, piece.end);
      multiply_tile(memory, in.width);
      for (int r = 0; r < tiles.heads_of_group; ++r) {
        // Kept in global memory between tiles, by the lane that reads it again: a pair a head is too much for registers.
        value_t* best = out + tiles.head(r);
        RowSum<value_t> running = {kNegInf, 0};
        if (inside && key > piece.begin) running = {best[0], best[pieces * all_rows]};
        double own = 0;
        if constexpr (kWide<value_t>) own = inside ? tiles.log_decay(memory.row_position[i], r) : 0.0;
        running = join_row(running, [&](int c) {
          const int j = quarter + 4 * c;
          if (!inside || !memory.seen(i, j)) return static_cast<value_t>(kNegInf);
          const int64_t token = memory.key_position[j];
          value_t logit = memory.products[i][j] * tiles.step(token, r);
          if constexpr (kWide<value_t>) logit *= tiles.decay(own, token, r);
          return logit;
        });
        // All four lanes of the row have read what is written now.
        __syncwarp();
        if (inside && quarter == 0) {
          best[0] = running.best;
          best[pieces * all_rows] = running.sum;
        }
        __syncwarp();
      }
    }
  }
}

// Means over the rows for every head of one tile of visual tokens. Grid: tiles, groups.
template <typename T, typename value_t>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    mass_kernel(MambaInputs in, const value_t* log_sum, value_t* per_head) {
  __shared__ MemoryFor<T, value_t> memory;
  Piece piece;
  if (!find_piece(in.visual_offsets, in.samples, kTile, blockIdx.x, piece)) return;
  const Tiles<T> tiles(in, piece.sample, blockIdx.y);
  const int j = threadIdx.x % kTile;
  const bool softmax = in.function == static_cast<int>(Function::kSoftmax), inside = piece.begin + j < piece.end;
  for (int row = 0; row < tiles.rows; row += kTile) {
    __syncthreads();
    tiles.set_sides(memory, row, piece.begin, piece.end);
    multiply_tile(memory, in.width);
    const int count = tiles.rows - row < kTile ? tiles.rows - row : kTile;
    for (int r = threadIdx.x / kTile; r < tiles.heads_of_group && inside; r += kThreads / kTile) {
      const int64_t token = memory.key_position[j], head = tiles.head(r);
      const float step = tiles.step(token, r);
      value_t sum = 0;
      for (int i = 0; i < count; ++i) {
        if (!memory.seen(i, j)) continue;
        value_t value = apply<value_t>(in.function, memory.products[i][j]) * step;
        if constexpr (kWide<value_t>) value *= tiles.decay(tiles.log_decay(memory.row_position[i], r), token, r);
        sum += softmax ? exp_of(value - log_sum[(tiles.first_query + row + i) * in.heads + head]) : value;
      }
      // This thread alone writes here, so it may add tile after tile.
      value_t* out = per_head + head * in.visual + piece.begin + j;
      *out = (row == 0 ? 0 : *out) + sum / static_cast<value_t>(tiles.rows);
    }
  }
}

template <typename T, typename value_t>
void launch_log_sum(const MambaInputs& in, void* partial, void* log_sum, cudaStream_t stream) {
  const int64_t size = share_of(in.visual), pieces = max_pieces(in.visual, in.samples, size);
  const int64_t rows = in.queries * in.heads;
  auto* sums = static_cast<value_t*>(partial);
  launch(log_sum_kernel<T, value_t>, dim3(static_cast<unsigned>(pieces), in.groups), kThreads, stream, in, size, pieces,
         sums);
  launch(join_pieces<value_t>, dim3(static_cast<unsigned>((rows + 255) / 256)), 256, stream, sums, in.query_offsets,
         in.visual_offsets, in.queries, in.samples, size, pieces, in.heads, static_cast<value_t*>(log_sum));
}

template <typename T, typename value_t>
void launch_mass(const MambaInputs& in, const void* log_sum, void* per_head, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(max_pieces(in.visual, in.samples, kTile)), in.groups);
  launch(mass_kernel<T, value_t>, grid, kThreads, stream, in, static_cast<const value_t*>(log_sum),
         static_cast<value_t*>(per_head));
}

}  // namespace

void mamba_mean_rows(const MambaInputs& in, float* mean_c, cudaStream_t stream) {
  const dim3 channels((in.groups * in.width + kThreads - 1) / kThreads, static_cast<unsigned>(in.samples));
  launch(in.bf16 ? mean_rows_kernel<__nv_bfloat16> : mean_rows_kernel<float>, channels, kThreads, stream, in, mean_c);
}

void mamba_moments(const MambaInputs& in, const float* mean_c, double* partial, Moments moments, cudaStream_t stream) {
  const int64_t size = share_of(in.visual);
  const dim3 shares(static_cast<unsigned>(max_pieces(in.visual, in.samples, size)), in.groups);
  const dim3 heads(static_cast<unsigned>(in.samples), (in.heads + kThreads - 1) / kThreads);
  launch(in.bf16 ? moments_kernel<__nv_bfloat16> : moments_kernel<float>, shares, kThreads, stream, in, size, mean_c,
         partial);
  launch(in.bf16 ? join_moments<__nv_bfloat16> : join_moments<float>, heads, kThreads, stream, in, size, mean_c, partial,
         moments);
}

void mamba_one_pass(const MambaInputs& in, const float* mean_c, Moments moments, float* scores, cudaStream_t stream) {
  const dim3 tokens(static_cast<unsigned>(max_pieces(in.visual, in.samples, kTokensPerBlock)));
  launch(in.bf16 ? one_pass_kernel<__nv_bfloat16> : one_pass_kernel<float>, tokens, kThreads, stream, in, mean_c, moments,
         scores);
}

void mamba_log_sum(const MambaInputs& in, void* partial, void* log_sum, cudaStream_t stream) {
  if (in.bf16) {
    (in.log_decay ? launch_log_sum<__nv_bfloat16, double> : launch_log_sum<__nv_bfloat16, float>)(in, partial, log_sum,
                                                                                                  stream);
  } else {
    (in.log_decay ? launch_log_sum<float, double> : launch_log_sum<float, float>)(in, partial, log_sum, stream);
  }
}

void mamba_mass(const MambaInputs& in, const void* log_sum, void* per_head, cudaStream_t stream) {
  if (in.bf16) {
    (in.log_decay ? launch_mass<__nv_bfloat16, double> : launch_mass<__nv_bfloat16, float>)(in, log_sum, per_head,
                                                                                            stream);
  } else {
    (in.log_decay ? launch_mass<float, double> : launch_mass<float, float>)(in, log_sum, per_head, stream);
  }
}

}  // namespace hybridprune::cuda
