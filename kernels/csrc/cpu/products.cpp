// Sums of a tile of products stay in registers: 12 x 32 floats where a register holds 16, less where it holds fewer. The
// widest registers that the processor has are chosen at run time.
#include "products.h"

#include <cstring>

namespace hybridprune {
namespace {

#define HP_INLINE __attribute__((always_inline)) inline
#define HP_UNROLL _Pragma("GCC unroll 16")

template <typename value_t, int kBytes>
struct Register {
  typedef value_t type __attribute__((vector_size(kBytes)));
};

// kRows rows by kVectors registers of keys.
template <typename value_t, int kBytes, int kRows, int kVectors>
HP_INLINE void multiply_tile(value_t* out, int64_t stride, const value_t* rows, const value_t* keys, int64_t width) {
  using Vector = typename Register<value_t, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(value_t);
  Vector sums[kRows][kVectors];
  HP_UNROLL for (int i = 0; i < kRows; ++i) {
    HP_UNROLL for (int v = 0; v < kVectors; ++v) sums[i][v] = Vector{};
  }
  for (int64_t n = 0; n < width; ++n) {
    Vector key[kVectors];
    HP_UNROLL for (int v = 0; v < kVectors; ++v) std::memcpy(&key[v], keys + n * kKeyPack + v * kLanes, kBytes);
    HP_UNROLL for (int i = 0; i < kRows; ++i) {
      const value_t row = rows[n * kRowPack + i];
      HP_UNROLL for (int v = 0; v < kVectors; ++v) sums[i][v] += row * key[v];
    }
  }
  HP_UNROLL for (int i = 0; i < kRows; ++i) {
    HP_UNROLL for (int v = 0; v < kVectors; ++v) std::memcpy(out + i * stride + v * kLanes, &sums[i][v], kBytes);
  }
}

// A pack of keys stays in the nearest cache while all rows pass.
template <typename value_t, int kBytes, int kRows, int kVectors>
HP_INLINE void multiply_all(value_t* out, int64_t stride, const value_t* rows, int64_t row_packs, const value_t* keys,
                            int64_t key_packs, int64_t width) {
  constexpr int64_t kColumns = kVectors * kBytes / sizeof(value_t);
  static_assert(kRowPack % kRows == 0 && kKeyPack % kColumns == 0);
  for (int64_t j = 0; j < key_packs * kKeyPack; j += kKeyPack) {
    for (int64_t i = 0; i < row_packs * kRowPack; i += kRowPack) {
      for (int64_t column = 0; column < kKeyPack; column += kColumns) {
        for (int64_t row = 0; row < kRowPack; row += kRows) {
          multiply_tile<value_t, kBytes, kRows, kVectors>(out + (i + row) * stride + j + column, stride,
                                                          rows + i * width + row, keys + j * width + column, width);
        }
      }
    }
  }
}

template <typename value_t>
using Multiply = void (*)(value_t*, int64_t, const value_t*, int64_t, const value_t*, int64_t, int64_t);

template <typename value_t>
void multiply_16(value_t* out, int64_t stride, const value_t* rows, int64_t row_packs, const value_t* keys,
                 int64_t key_packs, int64_t width) {
  multiply_all<value_t, 16, 6, 2>(out, stride, rows, row_packs, keys, key_packs, width);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <typename value_t>
__attribute__((target("arch=x86-64-v3"))) void multiply_32(value_t* out, int64_t stride, const value_t* rows,
                                                           int64_t row_packs, const value_t* keys, int64_t key_packs,
                                                           int64_t width) {
  multiply_all<value_t, 32, 6, 2>(out, stride, rows, row_packs, keys, key_packs, width);
}

template <typename value_t>
__attribute__((target("arch=x86-64-v4"))) void multiply_64(value_t* out, int64_t stride, const value_t* rows,
                                                           int64_t row_packs, const value_t* keys, int64_t key_packs,
                                                           int64_t width) {
  multiply_all<value_t, 64, 12, 2>(out, stride, rows, row_packs, keys, key_packs, width);
}

template <typename value_t>
Multiply<value_t> widest() {
  if (__builtin_cpu_supports("x86-64-v4")) return multiply_64<value_t>;
  if (__builtin_cpu_supports("x86-64-v3")) return multiply_32<value_t>;
  return multiply_16<value_t>;
}
#else
template <typename value_t>
Multiply<value_t> widest() {
  return multiply_16<value_t>;
}
#endif

}  // namespace

void multiply_packed(float* out, int64_t stride, const float* rows, int64_t row_packs, const float* keys,
                     int64_t key_packs, int64_t width) {
  static const Multiply<float> multiply = widest<float>();
  multiply(out, stride, rows, row_packs, keys, key_packs, width);
}

void multiply_packed(double* out, int64_t stride, const double* rows, int64_t row_packs, const double* keys,
                     int64_t key_packs, int64_t width) {
  static const Multiply<double> multiply = widest<double>();
  multiply(out, stride, rows, row_packs, keys, key_packs, width);
}

}  // namespace hybridprune
