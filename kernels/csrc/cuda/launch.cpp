// The CUDA operators as torch knows them: checks, outputs and scratch memory; the kernels are in the .cu files.
#include <ATen/core/Tensor.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "../sums.h"
#include "kernels.h"

#ifdef HP_ON_CPU
struct DeviceOf {
  explicit DeviceOf(const at::Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
// Makes a tensor's device the current one, and knows its stream.
struct DeviceOf {
  explicit DeviceOf(const at::Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};
#endif

namespace hybridprune {
namespace {

at::Tensor scratch(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType type = at::kFloat) {
  return at::empty(sizes, like.options().dtype(type));
}

// Contiguous, and from an address that divides by what a kernel loads at once: a view may start anywhere.
at::Tensor readable(const at::Tensor& tensor) {
  const at::Tensor rows = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : rows.clone();
}

// What the kernels read, contiguous, and kept alive.
struct AttentionTensors {
  at::Tensor q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets;
  cuda::AttentionInputs in;

  AttentionTensors(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& query_positions_in,
                   const at::Tensor& key_positions_in, const std::optional<at::Tensor>& always_seen_in,
                   const at::Tensor& query_offsets_in, const at::Tensor& key_offsets_in) {
    check_attention(q_in, k_in, query_positions_in, key_positions_in, always_seen_in, query_offsets_in, key_offsets_in);
    q = readable(q_in);
    k = readable(k_in);
    query_positions = query_positions_in.contiguous();
    key_positions = key_positions_in.contiguous();
    if (always_seen_in) always_seen = always_seen_in->contiguous();
    query_offsets = query_offsets_in.contiguous();
    key_offsets = key_offsets_in.contiguous();
    in.q = q.const_data_ptr();
    in.k = k.const_data_ptr();
    in.query_positions = query_positions.const_data_ptr<int64_t>();
    in.key_positions = key_positions.const_data_ptr<int64_t>();
    in.always_seen = always_seen_in ? always_seen.const_data_ptr<bool>() : nullptr;
    in.query_offsets = query_offsets.const_data_ptr<int64_t>();
    in.key_offsets = key_offsets.const_data_ptr<int64_t>();
    in.queries = q.size(0);
    in.keys = k.size(0);
    in.samples = query_offsets.size(0) - 1;
    in.heads = static_cast<int>(q.size(1));
    in.key_heads = static_cast<int>(k.size(1));
    in.width = static_cast<int>(q.size(2));
    in.bf16 = q.scalar_type() == at::kBFloat16;
  }
};

// [2, pieces, T * H] maxima and sums of the shares of a first pass.
at::Tensor partial_sums(const at::Tensor& like, int64_t keys, int64_t samples, int64_t rows,
                        at::ScalarType type = at::kFloat) {
  return scratch(like, {2, cuda::max_pieces(keys, samples, cuda::share_of(keys)), rows}, type);
}

at::Tensor mean_of_rows(const at::Tensor& rows) { return at::div(sum_of_rows(rows), static_cast<double>(rows.size(0))); }

at::Tensor attention_log_sum(const at::Tensor& q, const at::Tensor& k, const at::Tensor& query_positions,
                             const at::Tensor& key_positions, const std::optional<at::Tensor>& always_seen,
                             const at::Tensor& query_offsets, const at::Tensor& key_offsets) {
  const DeviceOf device(q);
  const AttentionTensors t(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  const at::Tensor out = scratch(q, {q.size(0), q.size(1)});
  const at::Tensor partial = partial_sums(q, t.in.keys, t.in.samples, t.in.queries * t.in.heads);
  cuda::attention_log_sum(t.in, partial.mutable_data_ptr<float>(), out.mutable_data_ptr<float>(), device.stream);
  return out;
}

at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& log_sum,
                          const at::Tensor& query_positions, const at::Tensor& key_positions,
                          const std::optional<at::Tensor>& always_seen, const at::Tensor& query_offsets,
                          const at::Tensor& key_offsets, c10::string_view pooling) {
  const DeviceOf device(q);
  const bool by_max = pools_by_max(pooling);
  const AttentionTensors t(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  check_log_sum(log_sum, q);
  const at::Tensor sums = log_sum.contiguous();
  // Keys of samples that nobody asks about stay 0.
  const at::Tensor per_key_head = at::zeros({k.size(1), k.size(0)}, q.options().dtype(at::kFloat));
  cuda::attention_mass(t.in, sums.const_data_ptr<float>(), by_max, per_key_head.mutable_data_ptr<float>(),
                       device.stream);
  return by_max ? per_key_head.amax(0) : mean_of_rows(per_key_head);
}

at::Tensor pooled_heads(const at::Tensor& per_head, int64_t groups, Pooling pooling) {
  if (pooling == Pooling::kMean) return mean_of_rows(per_head);
  if (pooling == Pooling::kMaxHeads) return per_head.amax(0);
  return mean_of_rows(per_head.unflatten(0, {groups, -1}).transpose(0, 1)).amax(0);
}

at::Tensor mamba_score(const at::Tensor& B_in, const at::Tensor& C_in, const std::optional<at::Tensor>& dt_in,
                       const std::optional<at::Tensor>& log_decay_in, const at::Tensor& visual_index_in,
                       const at::Tensor& visual_offsets_in, const at::Tensor& query_index_in,
                       const at::Tensor& query_offsets_in, c10::string_view function, bool contrast,
                       c10::string_view pooling) {
  const DeviceOf device(B_in);
  const Pooling pool = mamba_pooling_of(pooling);
  check_contrast(contrast, function, log_decay_in);
  check_mamba(B_in, C_in, dt_in, log_decay_in, visual_index_in, visual_offsets_in, query_index_in, query_offsets_in);
  const at::Tensor B = readable(B_in), C = readable(C_in);
  const at::Tensor dt = dt_in ? dt_in->contiguous() : at::Tensor();
  const at::Tensor log_decay = log_decay_in ? log_decay_in->contiguous() : at::Tensor();
  const at::Tensor visual_index = visual_index_in.contiguous(), visual_offsets = visual_offsets_in.contiguous();
  const at::Tensor query_index = query_index_in.contiguous(), query_offsets = query_offsets_in.contiguous();
  cuda::MambaInputs in;
  in.B = B.const_data_ptr();
  in.C = C.const_data_ptr();
  in.dt = dt_in ? dt.const_data_ptr<float>() : nullptr;
  in.log_decay = log_decay_in ? log_decay.const_data_ptr<double>() : nullptr;
  in.visual_index = visual_index.const_data_ptr<int64_t>();
  in.visual_offsets = visual_offsets.const_data_ptr<int64_t>();
  in.query_index = query_index.const_data_ptr<int64_t>();
  in.query_offsets = query_offsets.const_data_ptr<int64_t>();
  in.visual = visual_index.size(0);
  in.queries = query_index.size(0);
  in.samples = visual_offsets.size(0) - 1;
  in.groups = static_cast<int>(B.size(1));
  in.width = static_cast<int>(B.size(2));
  in.heads = static_cast<int>(mamba_heads(B, dt_in, log_decay_in));
  in.function = static_cast<int>(function_of(function));
  in.pooling = static_cast<int>(pool);
  in.bf16 = B.scalar_type() == at::kBFloat16;
  if (in.function == static_cast<int>(Function::kIdentity) && !log_decay_in) {
    const at::Tensor scores = scratch(B, {in.visual}), mean_c = scratch(B, {in.samples, B.size(1), B.size(2)});
    const at::Tensor centre = scratch(B, {contrast ? in.samples : 0, in.heads}, at::kDouble), scale = at::empty_like(centre);
    cuda::Moments moments{nullptr, nullptr};
    cuda::mamba_mean_rows(in, mean_c.mutable_data_ptr<float>(), device.stream);
    if (contrast) {
      moments = {centre.mutable_data_ptr<double>(), scale.mutable_data_ptr<double>()};
      const at::Tensor sums = partial_sums(B, in.visual, in.samples, in.heads, at::kDouble);
      cuda::mamba_moments(in, mean_c.const_data_ptr<float>(), sums.mutable_data_ptr<double>(), moments, device.stream);
    }
    cuda::mamba_one_pass(in, mean_c.const_data_ptr<float>(), moments, scores.mutable_data_ptr<float>(), device.stream);
    return scores;
  }
  const at::ScalarType type = log_decay_in ? at::kDouble : at::kFloat;
  at::Tensor log_sum;
  if (in.function == static_cast<int>(Function::kSoftmax)) {
    log_sum = scratch(B, {in.queries, in.heads}, type);
    const at::Tensor partial = partial_sums(B, in.visual, in.samples, in.queries * in.heads, type);
    cuda::mamba_log_sum(in, partial.mutable_data_ptr(), log_sum.mutable_data_ptr(), device.stream);
  }
  // Tokens of samples that ask nothing stay 0.
  const at::Tensor per_head = at::zeros({in.heads, in.visual}, B.options().dtype(type));
  cuda::mamba_mass(in, log_sum.defined() ? log_sum.const_data_ptr() : nullptr, per_head.mutable_data_ptr(),
                   device.stream);
  return pooled_heads(per_head, in.groups, pool).to(at::kFloat);
}

at::Tensor select(const at::Tensor& scores, const at::Tensor& offsets, const at::Tensor& kept_offsets,
                  int64_t num_kept) {
  const DeviceOf device(scores);
  check_select(scores, offsets, kept_offsets, num_kept);
  const at::Tensor values = scores.contiguous(), starts = offsets.contiguous(), kept = kept_offsets.contiguous();
  const at::Tensor out = at::empty({num_kept}, starts.options());
  cuda::select(values.const_data_ptr<float>(), starts.const_data_ptr<int64_t>(), kept.const_data_ptr<int64_t>(),
               starts.size(0) - 1, out.mutable_data_ptr<int64_t>(), device.stream);
  return out;
}

// Rows of ``from`` by an index that may say -1 for zeros.
at::Tensor copied(const at::Tensor& from, const at::Tensor& index, cudaStream_t stream) {
  const at::Tensor rows = from.contiguous();
  auto sizes = rows.sizes().vec();
  sizes[0] = index.size(0);
  const at::Tensor out = at::empty(sizes, rows.options());
  cuda::copy_rows(rows.const_data_ptr(), index.const_data_ptr<int64_t>(), index.size(0), rows.size(0),
                  row_size(rows) * static_cast<int64_t>(rows.element_size()), out.mutable_data_ptr(), stream);
  return out;
}

at::Tensor gather(const at::Tensor& rows, const at::Tensor& index) {
  const DeviceOf device(rows);
  check_gather(rows, index);
  return copied(rows, index.contiguous(), device.stream);
}

at::Tensor gather_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_rows) {
  const DeviceOf device(grad);
  check_gather(grad, index);
  TORCH_CHECK(grad.size(0) == index.size(0), "grad has ", grad.size(0), " rows: index has ", index.size(0));
  const at::Tensor kept = index.contiguous();
  // Every row of the gradient is written once: by the row it was gathered to, or zeros.
  const at::Tensor inverse = at::full({num_rows}, -1, kept.options());
  cuda::invert(kept.const_data_ptr<int64_t>(), kept.size(0), num_rows, inverse.mutable_data_ptr<int64_t>(),
               device.stream);
  return copied(grad, inverse, device.stream);
}

}  // namespace
}  // namespace hybridprune

#ifdef HP_ON_CPU
// tests/kernels runs the kernels' own code on a CPU.
TORCH_LIBRARY(hybridprune_emulated, m) {
  m.def("attention_log_sum", TORCH_FN(hybridprune::attention_log_sum));
  m.def("attention_mass", TORCH_FN(hybridprune::attention_mass));
  m.def("mamba_score", TORCH_FN(hybridprune::mamba_score));
  m.def("select", TORCH_FN(hybridprune::select));
  m.def("gather", TORCH_FN(hybridprune::gather));
  m.def("gather_backward", TORCH_FN(hybridprune::gather_backward));
}
#else
TORCH_LIBRARY_IMPL(hybridprune, CUDA, m) {
  m.impl("attention_log_sum", TORCH_FN(hybridprune::attention_log_sum));
  m.impl("attention_mass", TORCH_FN(hybridprune::attention_mass));
  m.impl("mamba_score", TORCH_FN(hybridprune::mamba_score));
  m.impl("select", TORCH_FN(hybridprune::select));
  m.impl("gather", TORCH_FN(hybridprune::gather));
  m.impl("gather_backward", TORCH_FN(hybridprune::gather_backward));
}
#endif
