// Products of rows with keys, for blocks that fit a core's cache.
//
// Every product is the sum of its terms in their order, wherever row and key lie: a BLAS sums the last columns of a matrix
// in another order than those before them, and equal tokens would not score alike.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

namespace hybridprune {

// Rows and keys are packed by so many vectors, term by term: [vectors / size][width][size], zeros after the last.
constexpr int64_t kRowPack = 12, kKeyPack = 32;

inline int64_t round_up(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

typedef float FourFloats __attribute__((vector_size(16)));

inline FourFloats four(const float* x) {
  FourFloats values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

inline FourFloats four(const c10::BFloat16* x) { return FourFloats{x[0], x[1], x[2], x[3]}; }

inline void store(float* out, FourFloats values) { std::memcpy(out, &values, sizeof values); }

inline void store(double* out, FourFloats values) {
  for (int i = 0; i < 4; ++i) out[i] = values[i];
}

// Packs some vectors of float or c10::BFloat16 in packs of kSize, a multiple of 4; vector(j) is where the j-th one lies.
template <int64_t kSize, typename value_t, typename Vector>
void pack(value_t* packed, int64_t count, int64_t width, const Vector& vector) {
  int64_t j = 0;
  // Four vectors by four of their terms.
  for (; j + 4 <= count; j += 4) {
    const auto *x = vector(j), *y = vector(j + 1), *z = vector(j + 2), *w = vector(j + 3);
    value_t* out = packed + j / kSize * kSize * width + j % kSize;
    int64_t n = 0;
    for (; n + 4 <= width; n += 4, out += 4 * kSize) {
      const FourFloats a = four(x + n), b = four(y + n), c = four(z + n), d = four(w + n);
      const FourFloats ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const FourFloats later_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const FourFloats later_cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
      store(out + kSize, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
      store(out + 2 * kSize, __builtin_shufflevector(later_ab, later_cd, 0, 1, 4, 5));
      store(out + 3 * kSize, __builtin_shufflevector(later_ab, later_cd, 2, 3, 6, 7));
    }
    for (; n < width; ++n, out += kSize) {
      store(out, FourFloats{static_cast<float>(x[n]), static_cast<float>(y[n]), static_cast<float>(z[n]),
                            static_cast<float>(w[n])});
    }
  }
  for (; j < round_up(count, kSize); ++j) {
    value_t* out = packed + j / kSize * kSize * width + j % kSize;
    for (int64_t n = 0; n < width; ++n, out += kSize) *out = j < count ? static_cast<float>(vector(j)[n]) : 0.0f;
  }
}

// out[i * stride + j] = row i . key j, for all rows and keys of some packs.
void multiply_packed(float* out, int64_t stride, const float* rows, int64_t row_packs, const float* keys,
                     int64_t key_packs, int64_t width);
void multiply_packed(double* out, int64_t stride, const double* rows, int64_t row_packs, const double* keys,
                     int64_t key_packs, int64_t width);

}  // namespace hybridprune
