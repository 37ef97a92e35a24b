// What kernels need from the device beside plain C++: launches, warp sums, tensor-core products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace hybridprune::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Starts a kernel; nothing to do where the grid is empty.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, Args... args) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error != cudaSuccess) throw std::runtime_error(std::string("kernel launch: ") + cudaGetErrorString(error));
}

// Several numbers in one access; the address divides by the size of V.
template <typename V>
__device__ __forceinline__ const V& vector_at(const void* at) { return *static_cast<const V*>(at); }
template <typename V>
__device__ __forceinline__ V& vector_at(void* at) { return *static_cast<V*>(at); }

// D += A B^T on tensor cores for one warp: A is 16 x 16 (row by row), B 8 x 16 (row by row), D 16 x 8 in float32.
// With g = lane / 4 and t = lane % 4 a lane holds of A the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), of
// B the pairs (g, 2t), (g, 2t + 8), of D (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1): PTX ISA, mma.m16n8k16.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace hybridprune::cuda
