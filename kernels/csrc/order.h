// A number for every float32 whose order is that of torch.sort: NaN above everything, both zeros alike.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HP_BOTH __host__ __device__
#else
#define HP_BOTH
#endif

namespace hybridprune {

HP_BOTH inline uint32_t ordered(float value) {
  if (value != value) return 0xFFFFFFFFu;
  // Adding 0 makes a 0 of -0.
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace hybridprune
