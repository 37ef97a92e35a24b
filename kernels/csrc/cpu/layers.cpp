// What surrounds the scan in a Mamba layer, on the CPU: the causal convolution of ops/conv.py and the norms of ops/norm.py,
// each in one pass over its rows.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "grain.h"
#include "vector.h"

namespace hybridprune {
namespace {

// out_j += tap_j x_j
HP_VECTOR void add_products(float* __restrict__ out, const float* __restrict__ tap, const float* __restrict__ x,
                            int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] += tap[j] * x[j];
}

HP_VECTOR void take_silu(float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = x[j] / (1.0f + fast_exp(-x[j]));
}

// out_j = y_j silu(z_j); returns the sum of its squares.
HP_VECTOR float gate(float* __restrict__ out, const float* __restrict__ y, const float* __restrict__ z, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float value = y[j] * (z[j] / (1.0f + fast_exp(-z[j])));
    out[j] = value;
    sum += value * value;
  }
  return sum;
}

HP_VECTOR float squares(const float* x, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * x[j];
  return sum;
}

// out_j = x_j factor weight_j; ``out`` may be ``x``.
HP_VECTOR void normalise(float* out, const float* x, const float* weight, float factor, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = x[j] * factor * weight[j];
}

void check_rows(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, name, " is ", x.scalar_type(), ": expected float32");
  TORCH_CHECK(x.dim() == 2, name, " has ", x.dim(), " dimensions: expected [rows, width]");
}

void check_weight(const at::Tensor& weight, const char* name, int64_t width) {
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.dim() == 1 && weight.size(0) == width, name, " is ",
              weight.scalar_type(), " ", weight.sizes(), ": expected float32 [", width, "]");
}

// Rows that lie side by side are read where they are; only rows that are themselves scattered are copied.
at::Tensor rows_of(const at::Tensor& x) { return x.size(1) < 2 || x.stride(1) == 1 ? x : x.contiguous(); }

at::Tensor causal_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& offsets,
                       bool silu) {
  check_rows(x, "x");
  const int64_t length = x.size(0), channels = x.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.dim() == 2 && weight.size(0) == channels, "weight is ",
              weight.scalar_type(), " ", weight.sizes(), ": expected float32 [", channels, ", taps]");
  check_weight(bias, "bias", channels);
  check_int64(offsets, "offsets", x, -1);
  check_offsets(offsets, "offsets", length);
  const int64_t taps = weight.size(1);
  const at::Tensor values = rows_of(x), by_tap = weight.t().contiguous(), start = bias.contiguous();
  const at::Tensor starts = offsets.contiguous(), out = at::empty({length, channels}, x.options());
  const int64_t* sample_start = starts.const_data_ptr<int64_t>();
  const int64_t *samples_end = sample_start + starts.size(0), stride = values.stride(0);
  const float *from = values.const_data_ptr<float>(), *tap = by_tap.const_data_ptr<float>();
  const float* first = start.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, length, grain(channels * sizeof(float)), [&](int64_t begin, int64_t end) {
    // The last sample that starts at or before the row; empty ones start where the next does.
    const int64_t* sample = std::upper_bound(sample_start, samples_end, begin) - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (sample + 1 < samples_end && sample[1] <= i) ++sample;
      float* row = to + i * channels;
      std::copy(first, first + channels, row);
      for (int64_t back = std::min(taps - 1, i - *sample); back >= 0; --back) {
        add_products(row, tap + (taps - 1 - back) * channels, from + (i - back) * stride, channels);
      }
      if (silu) take_silu(row, channels);
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  check_rows(x, "x");
  const int64_t length = x.size(0), width = x.size(1);
  check_weight(weight, "weight", width);
  const at::Tensor values = rows_of(x), factors = weight.contiguous();
  const at::Tensor out = at::empty({length, width}, x.options()), scale = at::empty({length, 1}, x.options());
  const float *from = values.const_data_ptr<float>(), *by = factors.const_data_ptr<float>();
  const int64_t stride = values.stride(0);
  float *to = out.mutable_data_ptr<float>(), *scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, length, grain(width * sizeof(float)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = from + i * stride;
      scales[i] = 1.0f / std::sqrt(squares(row, width) / width + static_cast<float>(epsilon));
      normalise(to + i * width, row, by, scales[i], width);
    }
  });
  return {out, scale};
}

std::tuple<at::Tensor, at::Tensor> gated_rms_norm(const at::Tensor& y, const at::Tensor& z, const at::Tensor& weight,
                                                  int64_t group_width, double epsilon) {
  check_rows(y, "y");
  check_rows(z, "z");
  TORCH_CHECK(y.sizes() == z.sizes(), "y is ", y.sizes(), " and z ", z.sizes(), ": expected the same");
  const int64_t length = y.size(0), width = y.size(1);
  check_weight(weight, "weight", width);
  TORCH_CHECK(group_width > 0 && width % group_width == 0, "group_width=", group_width, ": expected a divisor of ", width);
  const int64_t groups = width / group_width;
  const at::Tensor values = rows_of(y), gates = rows_of(z), factors = weight.contiguous();
  const at::Tensor out = at::empty({length, width}, y.options()), scale = at::empty({length, groups, 1}, y.options());
  const float *from = values.const_data_ptr<float>(), *gated_by = gates.const_data_ptr<float>();
  const float* by = factors.const_data_ptr<float>();
  const int64_t y_stride = values.stride(0), z_stride = gates.stride(0);
  float *to = out.mutable_data_ptr<float>(), *scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, length, grain(width * sizeof(float)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t channel = g * group_width;
        float* row = to + i * width + channel;
        const float sum = gate(row, from + i * y_stride + channel, gated_by + i * z_stride + channel, group_width);
        const float factor = 1.0f / std::sqrt(sum / group_width + static_cast<float>(epsilon));
        normalise(row, row, by + channel, factor, group_width);
        scales[i * groups + g] = factor;
      }
    }
  });
  return {out, scale};
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) {
  m.impl("causal_conv", TORCH_FN(hybridprune::causal_conv));
  m.impl("rms_norm", TORCH_FN(hybridprune::rms_norm));
  m.impl("gated_rms_norm", TORCH_FN(hybridprune::gated_rms_norm));
}
