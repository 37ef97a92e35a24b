// The CUDA kernels as plain functions: what launch.cpp (torch, no nvcc) and the .cu files (nvcc, no torch) share.
//
// All pointers are device memory, contiguous, aligned as torch allocates. ``bf16``: whether q and k, or B and C, are
// bfloat16; otherwise they are float32. Offsets are int64 [samples + 1].
#pragma once

#include <cstdint>

// As the CUDA headers declare it.
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace hybridprune::cuda {

struct AttentionInputs {
  const void *q, *k;                                        // [T, H, E], [J, K, E]
  const int64_t *query_positions, *key_positions;           // [T], [J]
  const bool* always_seen;                                  // [J] or null
  const int64_t *query_offsets, *key_offsets;
  int64_t queries, keys, samples;
  int heads, key_heads, width;
  bool bf16;
};

struct MambaInputs {
  const void *B, *C;                                        // [L, G, N]
  const float* dt;                                          // [L, H] or null
  const double* log_decay;                                  // [L, H] or null
  const int64_t *visual_index, *visual_offsets;             // [V]
  const int64_t *query_index, *query_offsets;               // [T]
  int64_t visual, queries, samples;
  int groups, width, heads;
  int function, pooling;                                    // Function and Pooling of checks.h
  bool bf16;
};

// How many pieces of at most ``size`` the ranges of all samples are cut into, at most; see Pieces in tile.cuh.
inline int64_t max_pieces(int64_t total, int64_t samples, int64_t size) { return total / size + samples; }

// Keys of one block's share of a first pass: at most 128 shares, and one more a sample, whatever the length.
inline int64_t share_of(int64_t total) {
  const int64_t tiles = (total + 128 * 64 - 1) / (128 * 64);
  return 64 * (tiles < 4 ? 4 : tiles);
}

// partial: float32 [2, max_pieces(keys, samples, share_of(keys)), rows], rows = T * H. log_sum: [T, H].
void attention_log_sum(const AttentionInputs& in, float* partial, float* log_sum, cudaStream_t stream);
// per_key_head: float32 [K, J], zeros: over the heads that read a key head, their mean or the highest.
void attention_mass(const AttentionInputs& in, const float* log_sum, bool by_max, float* per_key_head,
                    cudaStream_t stream);

// What scores are measured against, of every sample and head; null: they are taken as they are.
struct Moments {
  double *centre, *scale;  // [samples, H]
};

// mean_c: float32 [samples, G, N].
void mamba_mean_rows(const MambaInputs& in, float* mean_c, cudaStream_t stream);
// partial: float64 [max_pieces(visual, samples, share_of(visual)), 2, H].
void mamba_moments(const MambaInputs& in, const float* mean_c, double* partial, Moments moments, cudaStream_t stream);
// scores: [V].
void mamba_one_pass(const MambaInputs& in, const float* mean_c, Moments moments, float* scores, cudaStream_t stream);
// With log_decay all of these are float64, else float32. partial: as above with visual tokens for keys; log_sum: [T, H].
void mamba_log_sum(const MambaInputs& in, void* partial, void* log_sum, cudaStream_t stream);
// per_head: [H, V]; log_sum only for the softmax.
void mamba_mass(const MambaInputs& in, const void* log_sum, void* per_head, cudaStream_t stream);

void select(const float* scores, const int64_t* offsets, const int64_t* kept_offsets, int64_t runs, int64_t* out,
            cudaStream_t stream);
// Row i of out is row index[i] of ``rows``, zeros where index[i] is -1; bytes: of one row.
void copy_rows(const void* rows, const int64_t* index, int64_t count, int64_t num_rows, int64_t bytes, void* out,
               cudaStream_t stream);
// inverse[index[i]] = i; what is not named stays.
void invert(const int64_t* index, int64_t count, int64_t num_rows, int64_t* inverse, cudaStream_t stream);

}  // namespace hybridprune::cuda
