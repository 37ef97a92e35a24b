// Attention scores on the CPU: blocks of logits by matrix products, everything behind them in vector loops.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "log_sums.h"

namespace hybridprune {
namespace {

// Keys of a share of the first pass, keys of a block of logits and rows of it: a block and its keys fit a core's cache.
constexpr int64_t kShare = 4096, kBlock = 512, kRows = 128;

struct Attention {
  at::Tensor q, k;  // q: float32 [K, T * R, E], scaled; k: [J, K, E].
  int64_t heads_of_key;
  const int64_t *query_positions, *key_positions, *query_offsets, *key_offsets;
  const bool* always_seen;
  int64_t samples;

  Attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& query_positions_,
            const at::Tensor& key_positions_, const std::optional<at::Tensor>& always_seen_,
            const at::Tensor& query_offsets_, const at::Tensor& key_offsets_) {
    check_attention(q_in, k_in, query_positions_, key_positions_, always_seen_, query_offsets_, key_offsets_);
    for (const auto* t : {&query_positions_, &key_positions_, &query_offsets_, &key_offsets_}) {
      TORCH_CHECK((*t).is_contiguous(), "positions and offsets must be contiguous");
    }
    TORCH_CHECK(!always_seen_ || always_seen_->is_contiguous(), "always_seen must be contiguous");
    check_offsets(query_offsets_, "query_offsets", q_in.size(0));
    check_offsets(key_offsets_, "key_offsets", k_in.size(0));
    const int64_t key_heads = k_in.size(1);
    heads_of_key = q_in.size(1) / key_heads;
    k = k_in.contiguous();
    q = q_in.to(at::kFloat).mul(1.0 / std::sqrt(static_cast<double>(q_in.size(2))));
    q = q.unflatten(1, {key_heads, heads_of_key}).transpose(0, 1).contiguous().flatten(1, 2);
    query_positions = query_positions_.const_data_ptr<int64_t>();
    key_positions = key_positions_.const_data_ptr<int64_t>();
    query_offsets = query_offsets_.const_data_ptr<int64_t>();
    key_offsets = key_offsets_.const_data_ptr<int64_t>();
    always_seen = always_seen_ ? always_seen_->const_data_ptr<bool>() : nullptr;
    samples = query_offsets_.size(0) - 1;
    const int64_t* end = key_positions + k.size(0);
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t *first = key_positions + key_offsets[sample], *last = key_positions + key_offsets[sample + 1];
      TORCH_CHECK(last <= end && std::is_sorted(first, last), "key_positions falls within sample ", sample,
                  ": expected them to rise");
    }
  }

  // Calls visit(row of the sample times R plus head, keys, logits, n) for every row of a sample and every block of its
  // keys [begin, end): the first n logits count, what a row does not see among them is -inf.
  template <typename Visit>
  void for_each_row(const Share& share, const Visit& visit) const {
    const int64_t width = k.size(2), key_heads = k.size(1), R = heads_of_key;
    const int64_t first_row = query_offsets[share.sample] * R, num_rows = query_offsets[share.sample + 1] * R - first_row;
    const at::Tensor keys = at::empty({kBlock, width}, at::kFloat);
    const at::Tensor logits = at::empty({kRows, kBlock}, at::kFloat);
    const at::Tensor q_head = q.select(0, share.head);
    for (int64_t begin = share.begin; begin < share.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, share.end - begin);
      load(keys.mutable_data_ptr<float>(), begin, n, share.head * width, key_heads * width);
      const at::Tensor block = keys.narrow(0, 0, n).t();
      for (int64_t row = 0; row < num_rows; row += kRows) {
        const int64_t rows = std::min(kRows, num_rows - row);
        at::Tensor out = at::from_blob(logits.mutable_data_ptr<float>(), {rows, n}, at::kFloat);
        at::mm_out(out, q_head.narrow(0, first_row + row, rows), block);
        float* values = out.mutable_data_ptr<float>();
        for (int64_t i = 0; i < rows; ++i, values += n) {
          const int64_t position = query_positions[(first_row + row + i) / R];
          visit(row + i, begin, values, hide(values, begin, n, position));
        }
      }
    }
  }

 private:
  void load(float* out, int64_t begin, int64_t n, int64_t offset, int64_t stride) const {
    const int64_t width = k.size(2);
    if (k.scalar_type() == at::kFloat) {
      const float* from = k.const_data_ptr<float>() + begin * stride + offset;
      for (int64_t j = 0; j < n; ++j) to_float(out + j * width, from + j * stride, width);
    } else {
      const auto* from = k.const_data_ptr<c10::BFloat16>() + begin * stride + offset;
      for (int64_t j = 0; j < n; ++j) to_float(out + j * width, from + j * stride, width);
    }
  }

  // How many of n logits of a row count; positions rise, so what is behind the row is the end of the block.
  int64_t hide(float* logits, int64_t begin, int64_t n, int64_t position) const {
    const int64_t* keys = key_positions + begin;
    const int64_t seen = std::upper_bound(keys, keys + n, position) - keys;
    if (always_seen == nullptr) return seen;
    for (int64_t j = seen; j < n; ++j) logits[j] = always_seen[begin + j] ? logits[j] : kNegInf;
    return n;
  }
};

at::Tensor attention_log_sum(const at::Tensor& q, const at::Tensor& k, const at::Tensor& query_positions,
                             const at::Tensor& key_positions, const std::optional<at::Tensor>& always_seen,
                             const at::Tensor& query_offsets, const at::Tensor& key_offsets) {
  const at::NoGradGuard no_grad;
  const Attention attention(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  const int64_t heads = q.size(1), R = attention.heads_of_key;
  const auto shares =
      shares_of(attention.key_offsets, attention.query_offsets, attention.samples, kShare, k.size(1));
  std::vector<RowSums> sums;
  sums.reserve(shares.size());
  for (const Share& share : shares) {
    sums.emplace_back((attention.query_offsets[share.sample + 1] - attention.query_offsets[share.sample]) * R);
  }
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad_here;
    for (int64_t i = first; i < last; ++i) {
      attention.for_each_row(shares[i], [&](int64_t row, int64_t, const float* logits, int64_t n) {
        sums[i].add(row, logits, n);
      });
    }
  });
  const at::Tensor out = at::full({q.size(0), heads}, kNegInf, at::kFloat);
  float* values = out.mutable_data_ptr<float>();
  for (size_t i = 0; i < shares.size(); ++i) {
    const int64_t first = attention.query_offsets[shares[i].sample];
    for (int64_t row = 0; row < sums[i].rows(); ++row) {
      float& value = values[(first + row / R) * heads + shares[i].head * R + row % R];
      value = sums[i].joined(row, value);
    }
  }
  return out;
}

at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& log_sum,
                          const at::Tensor& query_positions, const at::Tensor& key_positions,
                          const std::optional<at::Tensor>& always_seen, const at::Tensor& query_offsets,
                          const at::Tensor& key_offsets, c10::string_view pooling) {
  const at::NoGradGuard no_grad;
  const bool by_max = pools_by_max(pooling);
  const Attention attention(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  check_log_sum(log_sum, q);
  const at::Tensor sums = log_sum.contiguous();
  const float* row_sums = sums.const_data_ptr<float>();
  const int64_t heads = q.size(1), R = attention.heads_of_key, key_heads = k.size(1);
  const auto blocks = shares_of(attention.key_offsets, attention.query_offsets, attention.samples, kBlock, 1);
  const at::Tensor out = at::zeros({k.size(0)}, at::kFloat);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad_here;
    const at::Tensor columns = at::empty({R, kBlock}, at::kFloat);
    float* column = columns.mutable_data_ptr<float>();
    for (int64_t i = first; i < last; ++i) {
      Share block = blocks[i];
      const int64_t n = block.end - block.begin, first_query = attention.query_offsets[block.sample];
      const int64_t queries = attention.query_offsets[block.sample + 1] - first_query;
      float* scores = out.mutable_data_ptr<float>() + block.begin;
      for (block.head = 0; block.head < key_heads; ++block.head) {
        std::fill(column, column + R * kBlock, 0.0f);
        attention.for_each_row(block, [&](int64_t row, int64_t, const float* logits, int64_t seen) {
          const int64_t head = block.head * R + row % R;
          add_exp(column + row % R * kBlock, logits, seen, row_sums[(first_query + row / R) * heads + head]);
        });
        for (int64_t r = 0; r < R; ++r) {
          by_max ? take_max(scores, column + r * kBlock, n) : add(scores, column + r * kBlock, n);
        }
      }
      scale(scores, n, 1.0f / static_cast<float>(by_max ? queries : queries * heads));
    }
  });
  return out;
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) {
  m.impl("attention_log_sum", TORCH_FN(hybridprune::attention_log_sum));
  m.impl("attention_mass", TORCH_FN(hybridprune::attention_mass));
}
