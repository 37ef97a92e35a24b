// Chunked scan of Mamba-2 (SSD) on the CPU: the forward pass of ops/ssd_blocks.py, and the states its backward wants.
//
// Three passes: what every chunk writes to the state, the states from chunk to chunk, and the output. The first and the
// last go over chunks and groups in parallel; what a chunk needs never leaves a core's cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "vector.h"

namespace hybridprune {
namespace {

// exp(-60) is 1e-26, nothing beside the 1 of a token's own step; numbers below 1e-38 would cost fifty times the time.
constexpr float kLowest = -60.0f;
// Readers of a chunk whose products with one another are taken pair by pair.
constexpr int64_t kRows = 32;

inline float decay_of(float x) { return x < kLowest ? 0.0f : std::exp(x); }

// out_j = product_j exp(a - a_j) dt_j
HP_VECTOR void mix(float* __restrict__ out, const float* __restrict__ product, const float* __restrict__ log_decay,
                   const float* __restrict__ dt, float a, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float x = a - log_decay[j];
    out[j] = x < kLowest ? 0.0f : product[j] * fast_exp(x) * dt[j];
  }
}

// out_j = exp(a - a_j) dt_j
HP_VECTOR void weigh(float* __restrict__ out, const float* __restrict__ log_decay, const float* __restrict__ dt,
                     float a, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float x = a - log_decay[j];
    out[j] = x < kLowest ? 0.0f : fast_exp(x) * dt[j];
  }
}

// out_p = skip x_p + decay before_p + of_state state_p
HP_VECTOR void combine(float* __restrict__ out, const float* __restrict__ x, const float* __restrict__ before,
                       const float* __restrict__ state, float skip, float decay, float of_state, int64_t n) {
  for (int64_t p = 0; p < n; ++p) out[p] = skip * x[p] + decay * before[p] + of_state * state[p];
}

// out_p += sum_j weight_j x_jp, rows of x ``stride`` apart. Sums of 32 places stay in registers, two of each, for a
// processor adds to several while it waits for one.
HP_VECTOR void add_rows(float* __restrict__ out, const float* __restrict__ weight, const float* __restrict__ x,
                        int64_t stride, int64_t rows, int64_t n) {
  constexpr int64_t kStrip = 32;
  int64_t p = 0;
  for (; p + kStrip <= n; p += kStrip) {
    float even[kStrip] = {}, odd[kStrip] = {};
    int64_t j = 0;
    for (; j + 2 <= rows; j += 2) {
      for (int64_t k = 0; k < kStrip; ++k) even[k] += weight[j] * x[j * stride + p + k];
      for (int64_t k = 0; k < kStrip; ++k) odd[k] += weight[j + 1] * x[(j + 1) * stride + p + k];
    }
    for (; j < rows; ++j) {
      for (int64_t k = 0; k < kStrip; ++k) even[k] += weight[j] * x[j * stride + p + k];
    }
    for (int64_t k = 0; k < kStrip; ++k) out[p + k] += even[k] + odd[k];
  }
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t k = p; k < n; ++k) out[k] += weight[j] * x[j * stride + k];
  }
}

// next_k += decay state_k
HP_VECTOR void carry(float* __restrict__ next, const float* __restrict__ state, float decay, int64_t n) {
  for (int64_t k = 0; k < n; ++k) next[k] += decay * state[k];
}

// out_k = factor x_k
HP_VECTOR void scaled(float* __restrict__ out, const float* __restrict__ x, float factor, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = factor * x[k];
}

// A tensor whose rows, along the first dimension, are contiguous each; where they are is not asked.
at::Tensor side_by_side(const at::Tensor& x) {
  return x.size(0) > 0 && x.select(0, 0).is_contiguous() ? x : x.contiguous();
}

void check_scan(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
                const at::Tensor& C, const at::Tensor& D, const at::Tensor& sample_index, int64_t chunk) {
  TORCH_CHECK(x.dim() == 4, "x has ", x.dim(), " dimensions: expected [tokens, groups, heads of a group, width]");
  const int64_t L = x.size(0), G = x.size(1), R = x.size(2);
  TORCH_CHECK(dt.sizes() == x.sizes().slice(0, 3), "dt is ", dt.sizes(), ": expected the first three of x, ", x.sizes());
  TORCH_CHECK(A.sizes() == x.sizes().slice(1, 2) && D.sizes() == A.sizes(), "A is ", A.sizes(), " and D ", D.sizes(),
              ": expected [", G, ", ", R, "]");
  TORCH_CHECK(B.dim() == 3 && B.size(0) == L && B.size(1) == G && C.sizes() == B.sizes(), "B is ", B.sizes(),
              " and C ", C.sizes(), ": expected [", L, ", ", G, ", state size]");
  TORCH_CHECK(sample_index.dim() == 1 && sample_index.size(0) == L, "sample_index is ", sample_index.sizes(),
              ": expected [", L, "]");
  TORCH_CHECK(chunk > 0, "chunk=", chunk, ": expected 1 or more");
  for (const auto* each : {&x, &dt, &A, &B, &C, &D}) {
    TORCH_CHECK(each->scalar_type() == at::kFloat, "ssd_scan takes float32, not ", each->scalar_type());
  }
}

// Offsets into the tensors, and what a thread needs for one chunk of one group. x, B and C lie side by side in one matrix
// where they come from a convolution: their rows are read there, ``stride`` apart.
struct Scan {
  const float *x, *dt, *A, *B, *C, *D;
  const int32_t* sample;
  int64_t L, G, R, P, N, Q;
  int64_t x_stride, B_stride, C_stride;

  int64_t chunks() const { return (L + Q - 1) / Q; }
  int64_t start(int64_t chunk) const { return chunk * Q; }
  int64_t size(int64_t chunk) const { return std::min(Q, L - chunk * Q); }

  // [size, N] of one group of B or C.
  at::Tensor rows(const float* data, int64_t chunk, int64_t group, int64_t stride) const {
    return at::from_blob(const_cast<float*>(data) + start(chunk) * stride + group * N, {size(chunk), N}, {stride, 1},
                         at::kFloat);
  }

  // Where a token's heads of a group are in x.
  const float* heads(int64_t token, int64_t group) const { return x + token * x_stride + group * R * P; }

  // Steps [R, Q] of a chunk's heads and the running sums of dt A.
  void load(int64_t chunk, int64_t group, float* steps, float* log_decay) const {
    const int64_t n = size(chunk);
    for (int64_t r = 0; r < R; ++r) {
      const float rate = A[group * R + r];
      const float* from = dt + (start(chunk) * G + group) * R + r;
      float sum = 0.0f;
      for (int64_t i = 0; i < n; ++i) {
        const float step = from[i * G * R];
        steps[r * Q + i] = step;
        log_decay[r * Q + i] = sum += step * rate;
      }
    }
  }

  // Whether a token belongs to the sample whose state enters the chunk.
  bool entered(int64_t chunk, int64_t i) const {
    return sample[start(chunk) + i] == sample[std::max<int64_t>(start(chunk) - 1, 0)];
  }
};

// What the tokens of a chunk write to the state at its end: states[chunk + 1], without what entered.
void write_states(const Scan& s, int64_t chunk, int64_t group, std::vector<float>& buffer, float* states) {
  const int64_t n = s.size(chunk), width = s.R * s.P, last = s.start(chunk) + n - 1;
  buffer.resize(2 * s.R * s.Q + s.Q * width);
  float *steps = buffer.data(), *log_decay = steps + s.R * s.Q, *weighted = log_decay + s.R * s.Q;
  s.load(chunk, group, steps, log_decay);
  for (int64_t i = 0; i < n; ++i) {
    const float* x = s.heads(s.start(chunk) + i, group);
    // A sample that has ended before the chunk's end leaves nothing.
    const bool stays = s.sample[s.start(chunk) + i] == s.sample[last];
    for (int64_t r = 0; r < s.R; ++r) {
      const float* a = log_decay + r * s.Q;
      const float weight = stays ? steps[r * s.Q + i] * decay_of(a[n - 1] - a[i]) : 0.0f;
      scaled(weighted + i * width + r * s.P, x + r * s.P, weight, s.P);
    }
  }
  at::Tensor out = at::from_blob(states + ((chunk + 1) * s.G + group) * width * s.N, {width, s.N}, at::kFloat);
  at::mm_out(out, at::from_blob(weighted, {n, width}, at::kFloat).t(), s.rows(s.B, chunk, group, s.B_stride));
}

// What a chunk's tokens read: of the state that entered it, and of the tokens before them in the chunk.
//
// The tokens before are taken kRows readers at a time. With i the first of them and j a writer before i, the decay
// exp(a_r - a_j) of a reader r is exp(a_r - a_i) exp(a_i - a_j), both at most 1: so the writers are weighted once for all
// readers, and one product serves all heads of the group. Only among the readers themselves is every pair its own.
void write_output(const Scan& s, int64_t chunk, int64_t group, std::vector<float>& buffer, const float* states,
                  float* y) {
  const int64_t n = s.size(chunk), width = s.R * s.P, start = s.start(chunk);
  buffer.resize(s.Q * (2 * s.R + s.Q + 2 * width + 1) + kRows * (width + kRows));
  float *steps = buffer.data(), *log_decay = steps + s.R * s.Q, *product = log_decay + s.R * s.Q;
  float *from_state = product + s.Q * s.Q, *weighted = from_state + s.Q * width, *weight = weighted + s.Q * width;
  float *before = weight + s.Q, *among = before + kRows * width;
  s.load(chunk, group, steps, log_decay);
  const at::Tensor B = s.rows(s.B, chunk, group, s.B_stride), C = s.rows(s.C, chunk, group, s.C_stride);
  at::Tensor products = at::from_blob(product, {n, n}, at::kFloat);
  at::mm_out(products, C, B.t());
  at::Tensor read = at::from_blob(from_state, {n, width}, at::kFloat);
  const float* entering = states + (chunk * s.G + group) * width * s.N;
  at::mm_out(read, C, at::from_blob(const_cast<float*>(entering), {width, s.N}, at::kFloat).t());
  // Nobody reads a sample before its own. Tokens of a sample stand in a row.
  for (int64_t i = 0, own = 0; i < n; ++i) {
    if (s.sample[start + i] != s.sample[start + own]) own = i;
    std::fill(product + i * n, product + i * n + own, 0.0f);
  }
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t rows = std::min(kRows, n - first);
    if (first > 0) {
      for (int64_t r = 0; r < s.R; ++r) {
        weigh(weight, log_decay + r * s.Q, steps + r * s.Q, log_decay[r * s.Q + first], first);
        const float* x = s.heads(start, group) + r * s.P;
        for (int64_t j = 0; j < first; ++j) {
          scaled(weighted + j * width + r * s.P, x + j * s.x_stride, weight[j], s.P);
        }
      }
      at::Tensor reached = at::from_blob(before, {rows, width}, at::kFloat);
      at::mm_out(reached, at::from_blob(product + first * n, {rows, first}, {n, 1}, at::kFloat),
                 at::from_blob(weighted, {first, width}, at::kFloat));
    } else {
      std::fill(before, before + rows * width, 0.0f);
    }
    for (int64_t r = 0; r < s.R; ++r) {
      const float *a = log_decay + r * s.Q + first, *step = steps + r * s.Q + first;
      const float* x = s.heads(start + first, group) + r * s.P;
      for (int64_t i = 0; i < rows; ++i) {
        float* out = y + ((start + first + i) * s.G + group) * width + r * s.P;
        const float of_state = s.entered(chunk, first + i) ? decay_of(a[i]) : 0.0f;
        combine(out, x + i * s.x_stride, before + i * width + r * s.P, from_state + (first + i) * width + r * s.P,
                s.D[group * s.R + r], decay_of(a[i] - a[0]), of_state, s.P);
        mix(among, product + (first + i) * n + first, a, step, a[i], i + 1);
        add_rows(out, among, x, s.x_stride, i + 1, s.P);
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor> ssd_scan(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A,
                                            const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                                            const at::Tensor& sample_index, int64_t chunk) {
  check_scan(x, dt, A, B, C, D, sample_index, chunk);
  const at::Tensor inputs[] = {side_by_side(x), dt.contiguous(),  A.contiguous(),
                               side_by_side(B), side_by_side(C), D.contiguous()};
  const at::Tensor samples = sample_index.to(at::kInt).contiguous();
  const Scan s{inputs[0].const_data_ptr<float>(),
               inputs[1].const_data_ptr<float>(),
               inputs[2].const_data_ptr<float>(),
               inputs[3].const_data_ptr<float>(),
               inputs[4].const_data_ptr<float>(),
               inputs[5].const_data_ptr<float>(),
               samples.const_data_ptr<int32_t>(),
               x.size(0),
               x.size(1),
               x.size(2),
               x.size(3),
               B.size(2),
               chunk,
               inputs[0].stride(0),
               inputs[3].stride(0),
               inputs[4].stride(0)};
  const int64_t chunks = s.chunks(), state = s.P * s.N, heads = s.G * s.R;
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor states = at::empty({chunks + 1, s.G, s.R, s.P, s.N}, x.options());
  float *out = y.mutable_data_ptr<float>(), *all = states.mutable_data_ptr<float>();
  std::fill(all, all + heads * state, 0.0f);
  at::parallel_for(0, chunks * s.G, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    for (int64_t task = begin; task < end; ++task) write_states(s, task / s.G, task % s.G, buffer, all);
  });
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t k = 0; k < chunks; ++k) {
        // A state lives on where its sample reaches the chunk's end.
        if (!s.entered(k, s.size(k) - 1)) continue;
        float sum = 0.0f;
        for (int64_t i = 0; i < s.size(k); ++i) sum += s.dt[(s.start(k) + i) * heads + head] * s.A[head];
        carry(all + ((k + 1) * heads + head) * state, all + (k * heads + head) * state, decay_of(sum), state);
      }
    }
  });
  at::parallel_for(0, chunks * s.G, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    for (int64_t task = begin; task < end; ++task) write_output(s, task / s.G, task % s.G, buffer, all, out);
  });
  return {y, states};
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) { m.impl("ssd_scan", TORCH_FN(hybridprune::ssd_scan)); }
