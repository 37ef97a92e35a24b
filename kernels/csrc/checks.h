// What both devices ask of the arguments before they touch memory: dtypes, shapes, devices.
//
// Values of index tensors are checked on the CPU only (``check_offsets``, ``check_index``): on a GPU that would wait for
// the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "names.h"

namespace hybridprune {

inline bool is_score_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16;
}

inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& first, at::ScalarType dtype,
                       int64_t dim) {
  TORCH_CHECK(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ": expected ", dtype);
  TORCH_CHECK(t.dim() == dim, name, " has ", t.dim(), " dimensions: expected ", dim);
  TORCH_CHECK(t.device() == first.device(), name, " is on ", t.device(), ": expected ", first.device());
}

inline void check_int64(const at::Tensor& t, const char* name, const at::Tensor& first, int64_t size) {
  check_like(t, name, first, at::kLong, 1);
  TORCH_CHECK(size < 0 || t.size(0) == size, name, " has ", t.size(0), " entries: expected ", size);
}

// Two tensors of samples' offsets, which must tell of as many samples.
inline void check_offset_pair(const at::Tensor& a, const char* a_name, const at::Tensor& b, const char* b_name,
                              const at::Tensor& first) {
  check_int64(a, a_name, first, -1);
  TORCH_CHECK(a.size(0) >= 1, a_name, " is empty: expected the number of samples and one more");
  check_int64(b, b_name, first, a.size(0));
}

inline void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& query_positions,
                            const at::Tensor& key_positions, const std::optional<at::Tensor>& always_seen,
                            const at::Tensor& query_offsets, const at::Tensor& key_offsets) {
  TORCH_CHECK(is_score_dtype(q), "q is ", q.scalar_type(), ": expected float32 or bfloat16");
  check_like(q, "q", q, q.scalar_type(), 3);
  check_like(k, "k", q, q.scalar_type(), 3);
  TORCH_CHECK(q.size(2) == k.size(2) && k.size(2) > 0, "q and k have heads of width ", q.size(2), " and ", k.size(2),
              ": expected the same, at least 1");
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q has ", q.size(1), " heads and k ", k.size(1),
              ": the second must divide the first");
  check_int64(query_positions, "query_positions", q, q.size(0));
  check_int64(key_positions, "key_positions", q, k.size(0));
  check_offset_pair(query_offsets, "query_offsets", key_offsets, "key_offsets", q);
  if (always_seen) {
    check_like(*always_seen, "always_seen", q, at::kBool, 1);
    TORCH_CHECK(always_seen->size(0) == k.size(0), "always_seen has ", always_seen->size(0), " entries: k has ",
                k.size(0), " rows");
  }
}

inline void check_log_sum(const at::Tensor& log_sum, const at::Tensor& q) {
  check_like(log_sum, "log_sum", q, at::kFloat, 2);
  TORCH_CHECK(log_sum.size(0) == q.size(0) && log_sum.size(1) == q.size(1), "log_sum is ", log_sum.sizes(),
              ": expected ", q.sizes().slice(0, 2));
}

// Whether the highest head counts instead of the mean.
inline bool pools_by_max(c10::string_view pooling) {
  TORCH_CHECK(pooling == "mean" || pooling == "max", "pooling='", pooling, "': allowed are mean, max");
  return pooling == "max";
}

inline Function function_of(c10::string_view name) {
  if (name == "identity") return Function::kIdentity;
  if (name == "abs") return Function::kAbs;
  if (name == "relu") return Function::kRelu;
  TORCH_CHECK(name == "softmax", "function='", name, "': allowed are identity, abs, relu, softmax");
  return Function::kSoftmax;
}

inline Pooling mamba_pooling_of(c10::string_view name) {
  if (name == "mean") return Pooling::kMean;
  if (name == "max_groups") return Pooling::kMaxGroups;
  TORCH_CHECK(name == "max_heads", "pooling='", name, "': allowed are mean, max_groups, max_heads");
  return Pooling::kMaxHeads;
}

// Contrast is there for scores whose rows are averaged first; plain torch has the others.
inline void check_contrast(bool contrast, c10::string_view function, const std::optional<at::Tensor>& log_decay) {
  TORCH_CHECK(!contrast || (function == "identity" && !log_decay), "contrast with function='", function,
              log_decay ? "' and log_decay" : "'", ": expected identity without log_decay");
}

inline void check_mamba(const at::Tensor& B, const at::Tensor& C, const std::optional<at::Tensor>& dt,
                        const std::optional<at::Tensor>& log_decay, const at::Tensor& visual_index,
                        const at::Tensor& visual_offsets, const at::Tensor& query_index,
                        const at::Tensor& query_offsets) {
  TORCH_CHECK(is_score_dtype(B), "B is ", B.scalar_type(), ": expected float32 or bfloat16");
  check_like(B, "B", B, B.scalar_type(), 3);
  check_like(C, "C", B, B.scalar_type(), 3);
  TORCH_CHECK(B.sizes() == C.sizes(), "B is ", B.sizes(), " and C ", C.sizes(), ": expected the same");
  TORCH_CHECK(B.size(1) > 0 && B.size(2) > 0, "B is ", B.sizes(), ": expected a group and a state of at least 1");
  if (dt) check_like(*dt, "dt", B, at::kFloat, 2);
  if (log_decay) check_like(*log_decay, "log_decay", B, at::kDouble, 2);
  for (const auto* steps : {&dt, &log_decay}) {
    if (!*steps) continue;
    TORCH_CHECK((*steps)->size(0) == B.size(0) && (*steps)->size(1) > 0 && (*steps)->size(1) % B.size(1) == 0,
                "dt or log_decay is ", (*steps)->sizes(), ": expected ", B.size(0), " rows and a multiple of ",
                B.size(1), " heads");
  }
  TORCH_CHECK(!dt || !log_decay || dt->size(1) == log_decay->size(1), "dt and log_decay differ in heads");
  check_int64(visual_index, "visual_index", B, -1);
  check_int64(query_index, "query_index", B, -1);
  check_offset_pair(visual_offsets, "visual_offsets", query_offsets, "query_offsets", B);
}

// Heads that have weights of their own; without weights all heads of a group are alike, so one stands for them.
inline int64_t mamba_heads(const at::Tensor& B, const std::optional<at::Tensor>& dt,
                           const std::optional<at::Tensor>& log_decay) {
  return dt ? dt->size(1) : log_decay ? log_decay->size(1) : B.size(1);
}

inline void check_select(const at::Tensor& scores, const at::Tensor& offsets, const at::Tensor& kept_offsets,
                         int64_t num_kept) {
  check_like(scores, "scores", scores, at::kFloat, 1);
  check_offset_pair(offsets, "offsets", kept_offsets, "kept_offsets", scores);
  TORCH_CHECK(0 <= num_kept && num_kept <= scores.size(0), "num_kept=", num_kept, ": there are ", scores.size(0),
              " scores");
}

inline void check_gather(const at::Tensor& rows, const at::Tensor& index) {
  TORCH_CHECK(rows.dim() >= 1, "rows has no dimension: expected at least one");
  check_int64(index, "index", rows, -1);
}

// Elements of one row.
inline int64_t row_size(const at::Tensor& rows) {
  int64_t size = 1;
  for (const auto extent : rows.sizes().slice(1)) size *= extent;
  return size;
}

// CPU tensors only: offsets begin at 0, never fall and end at ``total``.
inline void check_offsets(const at::Tensor& offsets, const char* name, int64_t total) {
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const int64_t last = offsets.size(0) - 1;
  TORCH_CHECK(at[0] == 0 && at[last] == total, name, " goes from ", at[0], " to ", at[last], ": expected 0 to ", total);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK(at[i] <= at[i + 1], name, " falls from ", at[i], " to ", at[i + 1], " behind entry ", i);
  }
}

// CPU tensors only.
inline void check_index(const at::Tensor& index, const char* name, int64_t size) {
  const int64_t* at = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.size(0); ++i) {
    TORCH_CHECK(0 <= at[i] && at[i] < size, name, "[", i, "]=", at[i], ": there are ", size, " rows");
  }
}

}  // namespace hybridprune
