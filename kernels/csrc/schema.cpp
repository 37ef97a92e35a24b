// The operators. README.md says what the arguments are; checks.h holds callers to it.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace hybridprune {
namespace {

// Both passes one after the other, where all keys are here.
at::Tensor attention_score(const at::Tensor& q, const at::Tensor& k, const at::Tensor& query_positions,
                           const at::Tensor& key_positions, const std::optional<at::Tensor>& always_seen,
                           const at::Tensor& query_offsets, const at::Tensor& key_offsets, c10::string_view pooling) {
  using T = at::Tensor;
  using Optional = std::optional<at::Tensor>;
  static const auto log_sum =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("hybridprune::attention_log_sum", "")
          .typed<T(const T&, const T&, const T&, const T&, const Optional&, const T&, const T&)>();
  static const auto mass =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("hybridprune::attention_mass", "")
          .typed<T(const T&, const T&, const T&, const T&, const T&, const Optional&, const T&, const T&,
                   c10::string_view)>();
  const T sums = log_sum.call(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  return mass.call(q, k, sums, query_positions, key_positions, always_seen, query_offsets, key_offsets, pooling);
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY(hybridprune, m) {
  m.def(
      "attention_log_sum(Tensor q, Tensor k, Tensor query_positions, Tensor key_positions, Tensor? always_seen, "
      "Tensor query_offsets, Tensor key_offsets) -> Tensor");
  m.def(
      "attention_mass(Tensor q, Tensor k, Tensor log_sum, Tensor query_positions, Tensor key_positions, "
      "Tensor? always_seen, Tensor query_offsets, Tensor key_offsets, str pooling) -> Tensor");
  m.def(
      "attention_score(Tensor q, Tensor k, Tensor query_positions, Tensor key_positions, Tensor? always_seen, "
      "Tensor query_offsets, Tensor key_offsets, str pooling) -> Tensor",
      torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(hybridprune::attention_score)));
  m.def(
      "mamba_score(Tensor B, Tensor C, Tensor? dt, Tensor? log_decay, Tensor visual_index, Tensor visual_offsets, "
      "Tensor query_index, Tensor query_offsets, str function, bool contrast, str pooling) -> Tensor");
  m.def("select(Tensor scores, Tensor offsets, Tensor kept_offsets, SymInt num_kept) -> Tensor");
  m.def("gather(Tensor rows, Tensor index) -> Tensor");
  m.def("gather_backward(Tensor grad, Tensor index, SymInt num_rows) -> Tensor");
  m.def(
      "causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor offsets, bool silu) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor y, Tensor scale)");
  m.def(
      "gated_rms_norm(Tensor y, Tensor z, Tensor weight, int group_width, float epsilon) -> (Tensor out, Tensor scale)");
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor sample_index, int chunk) -> "
      "(Tensor y, Tensor states)");
}
