// Attention scores: two passes over tiles of 64 query rows and 64 keys. A row of a tile is one head of one query row.
#include "kernels.h"
#include "tile.cuh"

namespace hybridprune::cuda {
namespace {

// One key head's tiles of one sample. Its rows are in the order of heads, so that all rows of a head lie together.
template <typename T>
struct Tiles {
  const AttentionInputs& in;
  int key_head, queries, rows;
  int64_t first_query;
  float factor;

  __device__ Tiles(const AttentionInputs& inputs, int64_t sample, int head)
      : in(inputs), key_head(head),
        queries(static_cast<int>(inputs.query_offsets[sample + 1] - inputs.query_offsets[sample])),
        rows(queries * (inputs.heads / inputs.key_heads)), first_query(inputs.query_offsets[sample]),
        factor(rsqrtf(static_cast<float>(inputs.width))) {}

  // Where a row's head of its query stands among [T, H].
  __device__ int64_t place(int row) const {
    return (first_query + row % queries) * in.heads + key_head * (in.heads / in.key_heads) + row / queries;
  }

  // The first kTile threads tell what the tile's rows are, the next its keys.
  __device__ void set_rows(TileMemory<T>& memory, int row, const float* log_sum) const {
    const int i = threadIdx.x;
    if (i >= kTile) return;
    const bool inside = row + i < rows;
    const int64_t at = inside ? place(row + i) : 0;
    memory.row_start[i] = inside ? static_cast<const T*>(in.q) + at * in.width : nullptr;
    memory.row_position[i] = inside ? in.query_positions[at / in.heads] : -1;
    memory.row_sum[i] = inside && log_sum != nullptr ? log_sum[at] : 0.0f;
  }

  __device__ void set_keys(TileMemory<T>& memory, int64_t key, int64_t end) const {
    const int j = static_cast<int>(threadIdx.x) - kTile;
    if (j < 0 || j >= kTile) return;
    const bool inside = key + j < end;
    memory.key_start[j] =
        inside ? static_cast<const T*>(in.k) + ((key + j) * in.key_heads + key_head) * in.width : nullptr;
    memory.key_position[j] = inside ? in.key_positions[key + j] : kNowhere;
    memory.always_seen[j] = inside && in.always_seen != nullptr && in.always_seen[key + j];
  }
};

// Maximum and sum of every row over one share of its keys. Grid: shares, key heads.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    log_sum_kernel(AttentionInputs in, int64_t size, int64_t pieces, float* partial) {
  __shared__ TileMemory<T> memory;
  Piece piece;
  if (!find_piece(in.key_offsets, in.samples, size, blockIdx.x, piece)) return;
  const Tiles<T> tiles(in, piece.sample, blockIdx.y);
  const int i = threadIdx.x / 4, quarter = threadIdx.x % 4;
  for (int row = 0; row < tiles.rows; row += kTile) {
    RowSum<float> running = {kNegInf, 0.0f};
    for (int64_t key = piece.begin; key < piece.end; key += kTile) {
      // All have read the tile before this one.
      __syncthreads();
      tiles.set_rows(memory, row, nullptr);
      tiles.set_keys(memory, key, piece.end);
      multiply_tile(memory, in.width);
      running = join_row(running, [&](int c) {
        const int j = quarter + 4 * c;
        return memory.seen(i, j) ? memory.products[i][j] * tiles.factor : kNegInf;
      });
    }
    if (quarter == 0 && row + i < tiles.rows) {
      const int64_t all_rows = in.queries * in.heads;
      float* out = partial + blockIdx.x * all_rows + tiles.place(row + i);
      out[0] = running.best;
      out[pieces * all_rows] = running.sum;
    }
  }
}

// Column sums of one tile of keys. Grid: tiles of keys, key heads.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    mass_kernel(AttentionInputs in, const float* log_sum, bool by_max, float* per_key_head) {
  __shared__ TileMemory<T> memory;
  Piece piece;
  if (!find_piece(in.key_offsets, in.samples, kTile, blockIdx.x, piece)) return;
  const Tiles<T> tiles(in, piece.sample, blockIdx.y);
  if (tiles.rows == 0) return;
  // Of the first kTile threads' columns: the sum over the rows of one head so far, and the sum or the highest of heads.
  float sum = 0.0f, score = 0.0f;
  int rows_of_head = 0;
  for (int row = 0; row < tiles.rows; row += kTile) {
    __syncthreads();
    tiles.set_rows(memory, row, log_sum);
    tiles.set_keys(memory, piece.begin, piece.end);
    multiply_tile(memory, in.width);
    for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
      const int i = e / kTile, j = e % kTile;
      const float logit = memory.products[i][j] * tiles.factor;
      memory.products[i][j] = memory.seen(i, j) ? __expf(logit - memory.row_sum[i]) : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < kTile) {
      const int count = tiles.rows - row < kTile ? tiles.rows - row : kTile;
      for (int i = 0; i < count; ++i) {
        sum += memory.products[i][threadIdx.x];
        if (++rows_of_head == tiles.queries) {
          score = by_max ? fmaxf(score, sum) : score + sum;
          sum = 0.0f;
          rows_of_head = 0;
        }
      }
    }
  }
  const int64_t key = piece.begin + threadIdx.x;
  if (threadIdx.x < kTile && key < piece.end) {
    per_key_head[blockIdx.y * in.keys + key] = score / static_cast<float>(by_max ? tiles.queries : tiles.rows);
  }
}

}  // namespace

void attention_log_sum(const AttentionInputs& in, float* partial, float* log_sum, cudaStream_t stream) {
  const int64_t size = share_of(in.keys), pieces = max_pieces(in.keys, in.samples, size);
  const dim3 grid(static_cast<unsigned>(pieces), in.key_heads);
  if (in.bf16) {
    launch(log_sum_kernel<__nv_bfloat16>, grid, kThreads, stream, in, size, pieces, partial);
  } else {
    launch(log_sum_kernel<float>, grid, kThreads, stream, in, size, pieces, partial);
  }
  const int64_t rows = in.queries * in.heads;
  launch(join_pieces<float>, dim3(static_cast<unsigned>((rows + 255) / 256)), 256, stream, partial, in.query_offsets,
         in.key_offsets, in.queries, in.samples, size, pieces, in.heads, log_sum);
}

void attention_mass(const AttentionInputs& in, const float* log_sum, bool by_max, float* per_key_head,
                    cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(max_pieces(in.keys, in.samples, kTile)), in.key_heads);
  if (in.bf16) {
    launch(mass_kernel<__nv_bfloat16>, grid, kThreads, stream, in, log_sum, by_max, per_key_head);
  } else {
    launch(mass_kernel<float>, grid, kThreads, stream, in, log_sum, by_max, per_key_head);
  }
}

}  // namespace hybridprune::cuda
