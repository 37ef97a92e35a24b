// Selection and gather on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "../checks.h"
#include "../order.h"
#include "grain.h"

namespace hybridprune {
namespace {

// Writes the places of the ``kept`` highest of n scores to ``out``, rising; of equal ones the first.
void select_run(const float* scores, int64_t n, int64_t kept, int64_t first, int64_t* out) {
  if (kept == 0) return;
  std::vector<uint32_t> ranks(n), sorted(n);
  for (int64_t i = 0; i < n; ++i) ranks[i] = ordered(scores[i]);
  sorted = ranks;
  std::nth_element(sorted.begin(), sorted.begin() + (kept - 1), sorted.end(), std::greater<>());
  const uint32_t lowest = sorted[kept - 1];
  // Everything above the lowest that stays, and of those equal to it as many as there is room for.
  int64_t room = kept - std::count_if(ranks.begin(), ranks.end(), [&](uint32_t rank) { return rank > lowest; });
  for (int64_t i = 0; i < n; ++i) {
    if (ranks[i] > lowest || (ranks[i] == lowest && room-- > 0)) *out++ = first + i;
  }
}

at::Tensor select(const at::Tensor& scores, const at::Tensor& offsets, const at::Tensor& kept_offsets,
                  int64_t num_kept) {
  check_select(scores, offsets, kept_offsets, num_kept);
  const at::Tensor values = scores.contiguous(), starts = offsets.contiguous(), kept = kept_offsets.contiguous();
  check_offsets(starts, "offsets", scores.size(0));
  check_offsets(kept, "kept_offsets", num_kept);
  const int64_t *start = starts.const_data_ptr<int64_t>(), *place = kept.const_data_ptr<int64_t>();
  const int64_t runs = starts.size(0) - 1;
  for (int64_t run = 0; run < runs; ++run) {
    TORCH_CHECK(place[run + 1] - place[run] <= start[run + 1] - start[run], "run ", run, " is to keep ",
                place[run + 1] - place[run], " tokens: it has ", start[run + 1] - start[run]);
  }
  const at::Tensor out = at::empty({num_kept}, at::kLong);
  int64_t* indices = out.mutable_data_ptr<int64_t>();
  const float* score = values.const_data_ptr<float>();
  at::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      select_run(score + start[run], start[run + 1] - start[run], place[run + 1] - place[run], start[run],
                 indices + place[run]);
    }
  });
  return out;
}

at::Tensor gather(const at::Tensor& rows, const at::Tensor& index) {
  check_gather(rows, index);
  const at::Tensor from = rows.contiguous(), at_rows = index.contiguous();
  check_index(at_rows, "index", rows.size(0));
  auto sizes = rows.sizes().vec();
  sizes[0] = index.size(0);
  const at::Tensor out = at::empty(sizes, rows.options());
  const int64_t bytes = row_size(rows) * rows.element_size();
  if (bytes == 0) return out;
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* row = at_rows.const_data_ptr<int64_t>();
  at::parallel_for(0, index.size(0), grain(bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(target + i * bytes, source + row[i] * bytes, bytes);
  });
  return out;
}

at::Tensor gather_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_rows) {
  check_gather(grad, index);
  TORCH_CHECK(grad.size(0) == index.size(0), "grad has ", grad.size(0), " rows: index has ", index.size(0));
  const at::Tensor from = grad.contiguous(), at_rows = index.contiguous();
  check_index(at_rows, "index", num_rows);
  const int64_t *row = at_rows.const_data_ptr<int64_t>(), kept = index.size(0);
  for (int64_t i = 1; i < kept; ++i) {
    TORCH_CHECK(row[i - 1] < row[i], "index[", i, "]=", row[i], " behind ", row[i - 1], ": expected a rising index");
  }
  auto sizes = grad.sizes().vec();
  sizes[0] = num_rows;
  const at::Tensor out = at::empty(sizes, grad.options());
  const int64_t bytes = row_size(grad) * grad.element_size();
  if (bytes == 0) return out;
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  // Every row is written once: zeros, or what its gradient is.
  at::parallel_for(0, num_rows, grain(bytes), [&](int64_t first, int64_t last) {
    int64_t i = std::lower_bound(row, row + kept, first) - row;
    for (int64_t r = first; r < last; ++r) {
      if (i < kept && row[i] == r) {
        std::memcpy(target + r * bytes, source + i++ * bytes, bytes);
      } else {
        std::memset(target + r * bytes, 0, bytes);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) {
  m.impl("select", TORCH_FN(hybridprune::select));
  m.impl("gather", TORCH_FN(hybridprune::gather));
  m.impl("gather_backward", TORCH_FN(hybridprune::gather_backward));
}
