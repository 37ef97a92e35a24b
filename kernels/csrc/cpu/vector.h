// Loops over contiguous floats that the compiler turns into vector instructions, for the widest the processor has: every
// function exists once a level of x86-64, and the loader picks. Other processors get the one their compiler makes.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HP_VECTOR \
  [[maybe_unused]] static __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HP_VECTOR [[maybe_unused]] static
#endif

namespace hybridprune {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// exp to 2 units in the last place for x <= 88; 0 below -87, where float32 has no normal numbers; keeps NaN.
__attribute__((always_inline)) inline float fast_exp(float x) {
  constexpr float kLowest = -87.0f;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, which is then in the sum's low bits.
  constexpr float kRound = 12582912.0f;
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts, so that the difference keeps its digits.
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  // The low bits of ``shifted`` are n; 0x4B400000 is what 1.5 * 2^23 looks like.
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kLowest ? 0.0f : p * power;
}

HP_VECTOR float row_max(const float* x, int64_t n) {
  float best = kNegInf;
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) best = x[j] > best ? x[j] : best;
  return best;
}

// sum_j exp(x_j - shift)
HP_VECTOR float sum_exp(const float* x, int64_t n, float shift) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += fast_exp(x[j] - shift);
  return sum;
}

// out_j += exp(x_j - shift)
HP_VECTOR void add_exp(float* __restrict__ out, const float* __restrict__ x, int64_t n, float shift) {
  for (int64_t j = 0; j < n; ++j) out[j] += fast_exp(x[j] - shift);
}

// out_j = exp(float(a - b_j)); differences of large sums, so float64 until then.
HP_VECTOR void decay_row(float* __restrict__ out, double a, const double* __restrict__ b, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = fast_exp(static_cast<float>(a - b[j]));
}

HP_VECTOR void add(float* __restrict__ out, const float* __restrict__ x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] += x[j];
}

// ``out`` may be ``x``.
HP_VECTOR void multiply(float* out, const float* x, const float* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = x[j] * y[j];
}

HP_VECTOR void take_max(float* __restrict__ out, const float* __restrict__ x, int64_t n) {
  // Keeps NaN, as torch does.
  for (int64_t j = 0; j < n; ++j) out[j] = out[j] >= x[j] || out[j] != out[j] ? out[j] : x[j];
}

HP_VECTOR void scale(float* x, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

HP_VECTOR void take_abs(float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = std::fabs(x[j]);
}

HP_VECTOR void take_relu(float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = x[j] < 0.0f ? 0.0f : x[j];
}

HP_VECTOR void to_float(float* __restrict__ out, const uint16_t* __restrict__ x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = static_cast<uint32_t>(x[j]) << 16;
    std::memcpy(&out[j], &bits, sizeof bits);
  }
}

inline void to_float(float* out, const c10::BFloat16* x, int64_t n) {
  to_float(out, reinterpret_cast<const uint16_t*>(x), n);
}

inline void to_float(float* out, const float* x, int64_t n) { std::memcpy(out, x, n * sizeof(float)); }

// For every group, b_g . c_g.
HP_VECTOR void group_products(float* out, const float* b, const float* c, int64_t groups, int64_t width) {
  for (int64_t g = 0; g < groups; ++g) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < width; ++n) sum += b[g * width + n] * c[g * width + n];
    out[g] = sum;
  }
}

HP_VECTOR void group_products(float* out, const uint16_t* b, const float* c, int64_t groups, int64_t width) {
  for (int64_t g = 0; g < groups; ++g) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < width; ++n) {
      const uint32_t bits = static_cast<uint32_t>(b[g * width + n]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      sum += value * c[g * width + n];
    }
    out[g] = sum;
  }
}

inline void group_products(float* out, const c10::BFloat16* b, const float* c, int64_t groups, int64_t width) {
  group_products(out, reinterpret_cast<const uint16_t*>(b), c, groups, width);
}

}  // namespace hybridprune
