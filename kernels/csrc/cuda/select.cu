// Selection by radix, one block a run, and copies of rows.
#include "../order.h"
#include "kernels.h"
#include "tile.cuh"

namespace hybridprune::cuda {
namespace {

constexpr int kSelectThreads = 1024;
constexpr int kEach = 4;  // neighbouring scores of a thread in the last pass

// The sum over the threads in front of this one, and over all in ``total``; every thread of the block calls it.
__device__ int sum_before(int value, int* warps, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  // What a pass before this one wrote here has been read by all.
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int i = 0; i < kSelectThreads / 32; ++i) {
    if (i < warp) before += warps[i];
    total += warps[i];
  }
  return before + sum - value;
}

// Places of the highest scores of a run, rising. Eight bits at a time, from the top: how often does each value of them
// occur among the scores whose upper bits are those of the lowest score that stays?
__global__ void __launch_bounds__(kSelectThreads) select_kernel(const float* scores, const int64_t* offsets,
                                                                const int64_t* kept_offsets, int64_t* out) {
  __shared__ int counts[256];
  __shared__ int warps[kSelectThreads / 32];
  __shared__ uint32_t prefix;
  __shared__ int left;
  const int64_t run = blockIdx.x, first = offsets[run];
  const int n = static_cast<int>(offsets[run + 1] - first), kept = static_cast<int>(kept_offsets[run + 1] - kept_offsets[run]);
  if (kept == 0) return;
  scores += first;
  out += kept_offsets[run];
  uint32_t known = 0;
  if (threadIdx.x == 0) {
    prefix = 0;
    left = kept;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kSelectThreads) {
      const uint32_t rank = ordered(scores[i]);
      if ((rank & known) == prefix) atomicAdd(&counts[rank >> shift & 255u], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int value = 255;
      for (; counts[value] < left; --value) left -= counts[value];
      prefix |= static_cast<uint32_t>(value) << shift;
    }
    known |= 255u << shift;
    __syncthreads();
  }
  // ``prefix`` is the lowest score that stays; of those equal to it the first ``left`` do.
  const uint32_t lowest = prefix;
  const int room = left;
  int equal = 0, written = 0;
  for (int start = 0; start < n; start += kSelectThreads * kEach) {
    uint32_t ranks[kEach];
    int above = 0, same = 0, of_all = 0, same_of_all = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = start + static_cast<int>(threadIdx.x) * kEach + e;
      // 0 is below all: no score becomes it.
      ranks[e] = i < n ? ordered(scores[i]) : 0u;
      above += ranks[e] > lowest;
      same += i < n && ranks[e] == lowest;
    }
    int same_before = equal + sum_before(same, warps, same_of_all);
    // Of those equal to the lowest, as many as there is room for behind the ones in front of this thread.
    const int has_room = room - same_before < same ? room - same_before : same;
    const int mine = above + (has_room > 0 ? has_room : 0);
    int place = written + sum_before(mine, warps, of_all);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = start + static_cast<int>(threadIdx.x) * kEach + e;
      const bool is_same = i < n && ranks[e] == lowest;
      if (ranks[e] > lowest || (is_same && same_before < room)) out[place++] = first + i;
      same_before += is_same;
    }
    equal += same_of_all;
    written += of_all;
  }
}

// Row i of out = row index[i] of rows, or zeros. A row is ``words`` of type W. Grid: rows, parts of a row.
template <typename W>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const W* rows, const int64_t* index, int64_t count,
                                                             int64_t num_rows, int64_t words, W* out) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t row = index[i];
    // An index that names no row would read what belongs to others; zeros where it is -1.
    const bool inside = 0 <= row && row < num_rows;
    const W* from = rows + (inside ? row : 0) * words;
    for (int64_t w = blockIdx.y * kThreads + threadIdx.x; w < words; w += static_cast<int64_t>(gridDim.y) * kThreads) {
      W value = {};
      if (inside) value = from[w];
      out[i * words + w] = value;
    }
  }
}

__global__ void __launch_bounds__(kThreads) invert_kernel(const int64_t* index, int64_t count, int64_t num_rows,
                                                          int64_t* inverse) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count && 0 <= index[i] && index[i] < num_rows) inverse[index[i]] = i;
}

template <typename W>
void copy_as(const void* rows, const int64_t* index, int64_t count, int64_t num_rows, int64_t bytes, void* out,
             cudaStream_t stream) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(W));
  const dim3 grid(static_cast<unsigned>(smaller(count, int64_t{1} << 30)),
                  static_cast<unsigned>(smaller((words + kThreads - 1) / kThreads, 64)));
  launch(copy_rows_kernel<W>, grid, kThreads, stream, static_cast<const W*>(rows), index, count, num_rows, words,
         static_cast<W*>(out));
}

}  // namespace

void select(const float* scores, const int64_t* offsets, const int64_t* kept_offsets, int64_t runs, int64_t* out,
            cudaStream_t stream) {
  launch(select_kernel, dim3(static_cast<unsigned>(runs)), kSelectThreads, stream, scores, offsets, kept_offsets, out);
}

void copy_rows(const void* rows, const int64_t* index, int64_t count, int64_t num_rows, int64_t bytes, void* out,
               cudaStream_t stream) {
  if (bytes == 0) return;
  // Sixteen bytes a thread where rows and their starts allow it.
  if (bytes % 16 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0) {
    copy_as<uint4>(rows, index, count, num_rows, bytes, out, stream);
  } else if (bytes % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 4 == 0) {
    copy_as<uint32_t>(rows, index, count, num_rows, bytes, out, stream);
  } else {
    copy_as<uint8_t>(rows, index, count, num_rows, bytes, out, stream);
  }
}

void invert(const int64_t* index, int64_t count, int64_t num_rows, int64_t* inverse, cudaStream_t stream) {
  launch(invert_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), kThreads, stream, index, count,
         num_rows, inverse);
}

}  // namespace hybridprune::cuda
