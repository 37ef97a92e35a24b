// Runs CUDA kernels on a CPU, so that their arithmetic, indices and barriers are tested where there is no GPU.
//
// A block's threads are fibers of one thread of the host. A fiber runs until it waits for its block or its warp; then
// another one runs, in an order that is drawn anew each time, as warps run ahead of each other on a device. Blocks run one
// after the other. Accesses to several numbers at once are refused where a device would refuse them.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct __nv_bfloat16 {
  uint16_t bits;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace hybridprune::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

// The fibers of the block that runs.
class Block {
 public:
  static constexpr size_t kStack = 128 * 1024;

  template <typename Run>
  void run(int threads, Run body) {
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStack]);
    fibers.assign(threads, {});
    start = body;
    for (int i = 0; i < threads; ++i) {
      getcontext(&fibers[i].context);
      fibers[i].context.uc_stack.ss_sp = stacks[i].get();
      fibers[i].context.uc_stack.ss_size = kStack;
      fibers[i].context.uc_link = nullptr;
      makecontext(&fibers[i].context, &Block::enter, 0);
    }
    order.resize(threads);
    for (int i = 0; i < threads; ++i) order[i] = i;
    volatile int left = threads, turn = 0;
    while (left > 0) {
      const volatile int before = progress;
      std::shuffle(order.begin(), order.end(), generator);
      for (turn = 0; turn < threads; ++turn) {
        current = order[turn];
        if (fibers[current].done || !may_run(fibers[current])) continue;
        threadIdx.x = current;
        // Contexts switch by system calls, so only a fiber's first start is one.
        if (_setjmp(scheduler_jump) == 0) {
          if (fibers[current].started) _longjmp(fibers[current].jump, 1);
          fibers[current].started = true;
          setcontext(&fibers[current].context);
        }
        ++progress;
        left -= fibers[current].done;
      }
      if (before == progress) throw std::runtime_error("a barrier that not all threads reach");
    }
    if (misaligned) {
      misaligned = false;
      throw std::runtime_error("an access to an address that does not divide by its size");
    }
  }

  // Fibers cannot throw: what happened is said when all of them are through.
  bool misaligned = false;

  // Waits until all living threads of the block (or of the warp) have come here as often as this one.
  void wait(bool warp) {
    Fiber& self = fibers[current];
    ++(warp ? self.warp_arrivals : self.block_arrivals);
    self.waits_for_warp = warp;
    self.waits = true;
    if (_setjmp(self.jump) == 0) _longjmp(scheduler_jump, 1);
    self.waits = false;
  }

  // What the lanes of this warp give each other.
  struct Exchange {
    unsigned char bytes[32][32];
  };
  Exchange& exchange() { return exchanges[current / 32]; }

 private:
  struct Fiber {
    ucontext_t context;
    jmp_buf jump;
    bool started = false, done = false, waits = false, waits_for_warp = false;
    long block_arrivals = 0, warp_arrivals = 0;
  };

  static void enter();

  bool may_run(const Fiber& fiber) const {
    if (!fiber.waits) return true;
    const size_t first = fiber.waits_for_warp ? current / 32 * 32 : 0;
    const size_t last = fiber.waits_for_warp ? std::min(first + 32, fibers.size()) : fibers.size();
    for (size_t i = first; i < last; ++i) {
      const Fiber& other = fibers[i];
      const long arrivals = fiber.waits_for_warp ? other.warp_arrivals : other.block_arrivals;
      const long own = fiber.waits_for_warp ? fiber.warp_arrivals : fiber.block_arrivals;
      if (!other.done && arrivals < own) return false;
    }
    return true;
  }

  std::vector<Fiber> fibers;
  std::vector<int> order;
  std::mt19937 generator{1};
  Exchange exchanges[32];
  std::function<void()> start;
  jmp_buf scheduler_jump;
  volatile int current = 0, progress = 0;
};

inline Block running;
inline void Block::enter() {
  running.start();
  running.fibers[running.current].done = true;
  _longjmp(running.scheduler_jump, 1);
}

template <typename V>
const V& vector_at(const void* at) {
  running.misaligned |= reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0;
  return *static_cast<const V*>(at);
}
template <typename V>
V& vector_at(void* at) {
  running.misaligned |= reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0;
  return *static_cast<V*>(at);
}

inline void __syncthreads() { running.wait(false); }
inline void __syncwarp() { running.wait(true); }

template <typename T>
T from_lane(T value, int lane) {
  const int own = threadIdx.x % 32;
  std::memcpy(running.exchange().bytes[own], &value, sizeof value);
  __syncwarp();
  T out;
  std::memcpy(&out, running.exchange().bytes[lane], sizeof out);
  __syncwarp();
  return out;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return from_lane(value, static_cast<int>(threadIdx.x % 32) ^ step);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x % 32;
  return from_lane(value, lane >= step ? lane - step : lane);
}

inline float half_of(uint32_t pair, int which) {
  const uint32_t bits = which == 0 ? pair << 16 : pair & 0xFFFF0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// From the table of PTX: which lane and register holds A[row][k] and B[column][k].
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& bytes = running.exchange().bytes;
  const int lane = threadIdx.x % 32;
  std::memcpy(bytes[lane], a, 16);
  std::memcpy(bytes[lane] + 16, b, 8);
  __syncwarp();
  const auto held = [&](int owner, int word) {
    uint32_t out;
    std::memcpy(&out, bytes[owner] + 4 * word, 4);
    return out;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t from_a = held(row % 8 * 4 + k % 8 / 2, (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0));
      const uint32_t from_b = held(column * 4 + k % 8 / 2, 4 + (k >= 8 ? 1 : 0));
      d[i] += half_of(from_a, k % 2) * half_of(from_b, k % 2);
    }
  }
  __syncwarp();
}

inline float __bfloat162float(__nv_bfloat16 value) { return half_of(value.bits, 0); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int atomicAdd(int* at, int value) {
  const int old = *at;
  *at += value;
  return old;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t, Args... args) {
  const std::tuple<Params...> values(static_cast<Params>(args)...);
  blockDim.x = threads;
  gridDim = {grid.x, grid.y, 1};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      running.run(threads, [&] { std::apply(kernel, values); });
    }
  }
}

}  // namespace hybridprune::cuda
