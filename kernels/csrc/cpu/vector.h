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

// The same for float64, to 2 units in the last place for x <= 709; 0 below -708.
__attribute__((always_inline)) inline double fast_exp(double x) {
  constexpr double kLowest = -708.0;
  constexpr double kRound = 6755399441055744.0;
  const double clamped = x < kLowest ? kLowest : x;
  const double shifted = clamped * 1.4426950408889634074 + kRound;
  const double n = shifted - kRound;
  const double r = (clamped - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  // 1 / k!, down from k = 13.
  double p = 1.6059043836821614599e-10;
  p = p * r + 2.0876756987868098979e-9;
  p = p * r + 2.5052108385441718775e-8;
  p = p * r + 2.7557319223985890653e-7;
  p = p * r + 2.7557319223985890653e-6;
  p = p * r + 2.4801587301587301587e-5;
  p = p * r + 1.9841269841269841270e-4;
  p = p * r + 1.3888888888888888889e-3;
  p = p * r + 8.3333333333333333333e-3;
  p = p * r + 4.1666666666666666667e-2;
  p = p * r + 1.6666666666666666667e-1;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4338000000000000 + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kLowest ? 0.0 : p * power;
}

// Loops over float or double. Where a place's bits must not depend on where it lies, those with exp get whole vectors
// (kKeyPack): a compiler may fuse operations at a loop's end in another way.

template <typename T>
HP_VECTOR T row_max(const T* x, int64_t n) {
  T best = kNegInf;
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) best = x[j] > best ? x[j] : best;
  return best;
}

// sum_j exp(x_j - shift)
template <typename T>
HP_VECTOR T sum_exp(const T* x, int64_t n, T shift) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += fast_exp(x[j] - shift);
  return sum;
}

// out_j += exp(x_j - shift)
template <typename T>
HP_VECTOR void add_exp(T* __restrict__ out, const T* __restrict__ x, int64_t n, T shift) {
  for (int64_t j = 0; j < n; ++j) out[j] += fast_exp(x[j] - shift);
}

// out_j = exp(a - b_j)
HP_VECTOR void decay_row(double* __restrict__ out, double a, const double* __restrict__ b, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = fast_exp(a - b[j]);
}

template <typename T>
HP_VECTOR void add(T* __restrict__ out, const T* __restrict__ x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] += x[j];
}

// ``out`` may be ``x``.
template <typename T>
HP_VECTOR void multiply(T* out, const T* x, const T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = x[j] * y[j];
}

template <typename T>
HP_VECTOR void take_max(T* __restrict__ out, const T* __restrict__ x, int64_t n) {
  // Keeps NaN, as torch does.
  for (int64_t j = 0; j < n; ++j) out[j] = out[j] >= x[j] || out[j] != out[j] ? out[j] : x[j];
}

template <typename T>
HP_VECTOR void scale(T* x, int64_t n, T factor) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

template <typename T>
HP_VECTOR void take_abs(T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = std::fabs(x[j]);
}

template <typename T>
HP_VECTOR void take_relu(T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = x[j] < 0 ? 0 : x[j];
}

__attribute__((always_inline)) inline float widened(float x) { return x; }

// A bfloat16 is the upper half of a float32.
__attribute__((always_inline)) inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// For every group b_g . c_g, the float32 terms summed in float64 and always in the same order: sums of every 16th term,
// then those by halves. The vectors c_g lie ``stride`` apart.
template <typename scalar_t>
HP_VECTOR void group_products(double* __restrict__ out, const scalar_t* __restrict__ b, const float* __restrict__ c,
                              int64_t stride, int64_t groups, int64_t width) {
  constexpr int64_t kSums = 16;
  for (int64_t g = 0; g < groups; ++g, b += width, c += stride) {
    double sums[kSums] = {};
    int64_t n = 0;
    for (; n + kSums <= width; n += kSums) {
#pragma omp simd
      for (int64_t i = 0; i < kSums; ++i) sums[i] += static_cast<double>(widened(b[n + i]) * c[n + i]);
    }
    for (int64_t i = 0; n < width; ++i, ++n) sums[i] += static_cast<double>(widened(b[n]) * c[n]);
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    out[g] = sums[0];
  }
}

// One token's heads: adds the gaps to a first token's scores, and their squares.
HP_VECTOR void add_gaps(double* __restrict__ total, double* __restrict__ squares, const double* __restrict__ scores,
                        const double* __restrict__ first, int64_t n) {
  for (int64_t h = 0; h < n; ++h) {
    const double gap = scores[h] - first[h];
    total[h] += gap;
    squares[h] += gap * gap;
  }
}

// out_h = |out_h - centre_h| scale_h
HP_VECTOR void contrast(double* __restrict__ out, const double* __restrict__ centre, const double* __restrict__ scale,
                        int64_t n) {
  for (int64_t h = 0; h < n; ++h) out[h] = std::fabs(out[h] - centre[h]) * scale[h];
}

}  // namespace hybridprune
