// Implicit attention of a Mamba-2 layer on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "log_sums.h"

namespace hybridprune {
namespace {

// Visual tokens of a share of the softmax's first pass, visual tokens of a block of products and rows of it.
constexpr int64_t kShare = 4096, kBlock = 512, kRows = 64;

struct Mamba {
  at::Tensor B, C, dt, log_decay;  // C: float32 [G, T, N] of the query rows; dt and log_decay as given, or undefined.
  int64_t groups, width, heads_of_group, samples;
  const int64_t *visual_index, *visual_offsets, *query_index, *query_offsets;
  Function function;

  Mamba(const at::Tensor& B_in, const at::Tensor& C_in, const std::optional<at::Tensor>& dt_in,
        const std::optional<at::Tensor>& log_decay_in, const at::Tensor& visual_index_, const at::Tensor& visual_offsets_,
        const at::Tensor& query_index_, const at::Tensor& query_offsets_, Function function_)
      : groups(0), width(0), heads_of_group(0), samples(0), function(function_) {
    check_mamba(B_in, C_in, dt_in, log_decay_in, visual_index_, visual_offsets_, query_index_, query_offsets_);
    for (const auto* t : {&visual_index_, &visual_offsets_, &query_index_, &query_offsets_}) {
      TORCH_CHECK((*t).is_contiguous(), "indices and offsets must be contiguous");
    }
    check_offsets(visual_offsets_, "visual_offsets", visual_index_.size(0));
    check_offsets(query_offsets_, "query_offsets", query_index_.size(0));
    check_index(visual_index_, "visual_index", B_in.size(0));
    check_index(query_index_, "query_index", B_in.size(0));
    B = B_in.contiguous();
    C = C_in.index_select(0, query_index_).to(at::kFloat).transpose(0, 1).contiguous();
    if (dt_in) dt = dt_in->contiguous();
    if (log_decay_in) log_decay = log_decay_in->contiguous();
    groups = B.size(1);
    width = B.size(2);
    heads_of_group = mamba_heads(B, dt_in, log_decay_in) / groups;
    samples = visual_offsets_.size(0) - 1;
    visual_index = visual_index_.const_data_ptr<int64_t>();
    visual_offsets = visual_offsets_.const_data_ptr<int64_t>();
    query_index = query_index_.const_data_ptr<int64_t>();
    query_offsets = query_offsets_.const_data_ptr<int64_t>();
    for (int64_t sample = 0; sample < samples; ++sample) {
      TORCH_CHECK(std::is_sorted(visual_index + visual_offsets[sample], visual_index + visual_offsets[sample + 1]),
                  "visual_index falls within sample ", sample, ": expected it to rise");
      TORCH_CHECK(visual_offsets[sample] == visual_offsets[sample + 1] ||
                      query_offsets[sample] < query_offsets[sample + 1],
                  "sample ", sample, " has visual tokens and no query to score them by");
    }
  }

  int64_t queries(int64_t sample) const { return query_offsets[sample + 1] - query_offsets[sample]; }

  // Visual tokens among n behind ``begin`` that a row sees: with decay those in front of it.
  int64_t seen(int64_t begin, int64_t n, int64_t query) const {
    if (!log_decay.defined()) return n;
    const int64_t* index = visual_index + begin;
    return std::upper_bound(index, index + n, query_index[query]) - index;
  }
};

// What one thread needs for a block of a group's visual tokens.
class Block {
 public:
  explicit Block(const Mamba& mamba)
      : mamba_(mamba), b_(at::empty({kBlock, mamba.width}, at::kFloat)), products_(at::empty({kRows, kBlock}, at::kFloat)),
        steps_(at::empty({mamba.heads_of_group, kBlock}, at::kFloat)),
        log_decay_(at::empty({mamba.log_decay.defined() ? mamba.heads_of_group : 0, kBlock}, at::kDouble)),
        row_(at::empty({kBlock}, at::kFloat)) {}

  // Calls visit(query, head of the group, values, n) for all rows of a sample: the first n visual tokens of the share's
  // block count, their values are f(C . B) exp(a_i - a_j), for the softmax times dt_j.
  template <typename Visit>
  void for_each_row(const Share& share, const Visit& visit) {
    const int64_t R = mamba_.heads_of_group, n = share.end - share.begin;
    load(share);
    const bool softmax = mamba_.function == Function::kSoftmax;
    const at::Tensor block = b_.narrow(0, 0, n).t(), C = mamba_.C.select(0, share.head);
    for (int64_t query = mamba_.query_offsets[share.sample]; query < mamba_.query_offsets[share.sample + 1];) {
      const int64_t rows = std::min(kRows, mamba_.query_offsets[share.sample + 1] - query);
      float* product = products_.mutable_data_ptr<float>();
      at::Tensor out = at::from_blob(product, {rows, n}, at::kFloat);
      at::mm_out(out, C.narrow(0, query, rows), block);
      if (mamba_.function == Function::kAbs) take_abs(product, rows * n);
      if (mamba_.function == Function::kRelu) take_relu(product, rows * n);
      for (const int64_t end = query + rows; query < end; ++query, product += n) {
        const int64_t seen = mamba_.seen(share.begin, n, query);
        if (!mamba_.log_decay.defined() && !softmax) {
          // All heads weigh alike until dt comes.
          visit(query, 0, product, seen);
          continue;
        }
        for (int64_t r = 0; r < R; ++r) visit(query, r, weighted(product, share, query, r, seen, softmax), seen);
      }
    }
  }

  // float32 [block] dt of a head of the group, ones where there is none.
  const float* steps(int64_t r) const { return steps_.const_data_ptr<float>() + r * kBlock; }

 private:
  const float* weighted(const float* product, const Share& share, int64_t query, int64_t r, int64_t n, bool with_steps) {
    float* row = row_.mutable_data_ptr<float>();
    const float* values = product;
    if (mamba_.log_decay.defined()) {
      const int64_t heads = mamba_.heads_of_group * mamba_.groups, head = share.head * mamba_.heads_of_group + r;
      const double own = mamba_.log_decay.const_data_ptr<double>()[mamba_.query_index[query] * heads + head];
      decay_row(row, own, log_decay_.const_data_ptr<double>() + r * kBlock, n);
      multiply(row, row, product, n);
      values = row;
    }
    if (with_steps) {
      multiply(row, values, steps(r), n);
      values = row;
    }
    return values;
  }

  void load(const Share& share) {
    const int64_t R = mamba_.heads_of_group, heads = R * mamba_.groups, width = mamba_.width;
    const int64_t offset = share.head * width, stride = mamba_.groups * width;
    float *b = b_.mutable_data_ptr<float>(), *steps = steps_.mutable_data_ptr<float>();
    double* decay = log_decay_.mutable_data_ptr<double>();
    for (int64_t j = share.begin; j < share.end; ++j) {
      const int64_t token = mamba_.visual_index[j], column = j - share.begin;
      if (mamba_.B.scalar_type() == at::kFloat) {
        to_float(b + column * width, mamba_.B.const_data_ptr<float>() + token * stride + offset, width);
      } else {
        to_float(b + column * width, mamba_.B.const_data_ptr<c10::BFloat16>() + token * stride + offset, width);
      }
      const int64_t head = token * heads + share.head * R;
      for (int64_t r = 0; r < R; ++r) {
        steps[r * kBlock + column] = mamba_.dt.defined() ? mamba_.dt.const_data_ptr<float>()[head + r] : 1.0f;
        if (mamba_.log_decay.defined()) {
          decay[r * kBlock + column] = mamba_.log_decay.const_data_ptr<double>()[head + r];
        }
      }
    }
  }

  const Mamba& mamba_;
  at::Tensor b_, products_, steps_, log_decay_, row_;
};

// float32 [T, H] log-sums of the softmax over visual tokens.
at::Tensor softmax_log_sums(const Mamba& mamba) {
  const int64_t R = mamba.heads_of_group, heads = R * mamba.groups;
  const auto shares =
      shares_of(mamba.visual_offsets, mamba.query_offsets, mamba.samples, kShare, mamba.groups);
  std::vector<RowSums> sums;
  sums.reserve(shares.size());
  for (const Share& share : shares) sums.emplace_back(mamba.queries(share.sample) * R);
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad;
    Block block(mamba);
    for (int64_t i = first; i < last; ++i) {
      const int64_t first_query = mamba.query_offsets[shares[i].sample];
      for (Share part = shares[i]; part.begin < shares[i].end; part.begin += kBlock) {
        part.end = std::min(part.begin + kBlock, shares[i].end);
        block.for_each_row(part, [&](int64_t query, int64_t r, const float* logits, int64_t n) {
          sums[i].add((query - first_query) * R + r, logits, n);
        });
      }
    }
  });
  const at::Tensor out = at::full({mamba.C.size(1), heads}, kNegInf, at::kFloat);
  float* values = out.mutable_data_ptr<float>();
  for (size_t i = 0; i < shares.size(); ++i) {
    const int64_t first = mamba.query_offsets[shares[i].sample];
    for (int64_t row = 0; row < sums[i].rows(); ++row) {
      float& value = values[(first + row / R) * heads + shares[i].head * R + row % R];
      value = sums[i].joined(row, value);
    }
  }
  return out;
}

// Pools over the heads of a group what the products of one group come to, into out [n].
void pool_heads(float* out, const float* columns, const Block& block, const Mamba& mamba, int64_t n, Pooling pooling,
                bool one_column, float factor) {
  const int64_t R = mamba.heads_of_group;
  const bool softmax = mamba.function == Function::kSoftmax;
  float value[kBlock];
  for (int64_t r = 0; r < R; ++r) {
    const float* column = columns + (one_column ? 0 : r * kBlock);
    if (softmax) {
      std::copy(column, column + n, value);
    } else {
      multiply(value, column, block.steps(r), n);
    }
    if (r == 0) {
      std::copy(value, value + n, out);
    } else if (pooling == Pooling::kMaxHeads) {
      take_max(out, value, n);
    } else {
      add(out, value, n);
    }
  }
  scale(out, n, pooling == Pooling::kMaxHeads ? factor : factor / static_cast<float>(R));
}

at::Tensor pooled_groups(const at::Tensor& per_group, Pooling pooling) {
  return pooling == Pooling::kMean ? per_group.mean(0) : per_group.amax(0);
}

// All variants that need products of every row with every visual token; their column sums are kept.
at::Tensor from_products(const Mamba& mamba, Pooling pooling) {
  const int64_t R = mamba.heads_of_group, heads = R * mamba.groups;
  const int64_t num_visual = mamba.visual_offsets[mamba.samples];
  const bool softmax = mamba.function == Function::kSoftmax, one_column = !softmax && !mamba.log_decay.defined();
  const at::Tensor log_sums = softmax ? softmax_log_sums(mamba) : at::Tensor();
  const float* row_sums = softmax ? log_sums.const_data_ptr<float>() : nullptr;
  const auto shares =
      shares_of(mamba.visual_offsets, mamba.query_offsets, mamba.samples, kBlock, mamba.groups);
  const at::Tensor out = at::empty({mamba.groups, num_visual}, at::kFloat);
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad;
    Block block(mamba);
    const at::Tensor columns = at::empty({R, kBlock}, at::kFloat);
    float* column = columns.mutable_data_ptr<float>();
    for (int64_t i = first; i < last; ++i) {
      const Share& share = shares[i];
      std::fill(column, column + R * kBlock, 0.0f);
      block.for_each_row(share, [&](int64_t query, int64_t r, const float* values, int64_t n) {
        if (softmax) {
          add_exp(column + r * kBlock, values, n, row_sums[query * heads + share.head * R + r]);
        } else {
          add(column + r * kBlock, values, n);
        }
      });
      pool_heads(out.mutable_data_ptr<float>() + share.head * num_visual + share.begin, column, block, mamba,
                 share.end - share.begin, pooling, one_column, 1.0f / static_cast<float>(mamba.queries(share.sample)));
    }
  });
  return pooled_groups(out, pooling);
}

// One token's score from its products with the mean of C and its steps [G, R].
float pooled(const float* products, const float* steps, int64_t groups, int64_t R, Pooling pooling) {
  float best = kNegInf, sum = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    float in_group = 0.0f;
    for (int64_t r = 0; r < R; ++r) {
      const float step = steps ? steps[g * R + r] : 1.0f;
      in_group += step;
      if (pooling == Pooling::kMaxHeads) best = std::max(best, products[g] * step);
    }
    const float mean = products[g] * in_group / static_cast<float>(R);
    if (pooling == Pooling::kMaxGroups) best = std::max(best, mean);
    sum += mean;
  }
  return pooling == Pooling::kMean ? sum / static_cast<float>(groups) : best;
}

// Identity without decay: the mean of C first, then one pass over B.
template <typename scalar_t>
at::Tensor one_pass(const Mamba& mamba, Pooling pooling) {
  const int64_t G = mamba.groups, R = mamba.heads_of_group, size = G * mamba.width;
  const at::Tensor out = at::empty({mamba.visual_offsets[mamba.samples]}, at::kFloat);
  const auto* b = mamba.B.const_data_ptr<scalar_t>();
  const float* steps = mamba.dt.defined() ? mamba.dt.const_data_ptr<float>() : nullptr;
  for (int64_t sample = 0; sample < mamba.samples; ++sample) {
    const int64_t queries = mamba.queries(sample);
    if (queries == 0) continue;
    const at::Tensor mean = mamba.C.narrow(1, mamba.query_offsets[sample], queries).mean(1);
    const float* c = mean.const_data_ptr<float>();
    at::parallel_for(mamba.visual_offsets[sample], mamba.visual_offsets[sample + 1], 256, [&](int64_t begin, int64_t end) {
      std::vector<float> products(G);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t token = mamba.visual_index[j];
        group_products(products.data(), b + token * size, c, G, mamba.width);
        const float* step = steps ? steps + token * G * R : nullptr;
        out.mutable_data_ptr<float>()[j] = pooled(products.data(), step, G, R, pooling);
      }
    });
  }
  return out;
}

at::Tensor mamba_score(const at::Tensor& B, const at::Tensor& C, const std::optional<at::Tensor>& dt,
                       const std::optional<at::Tensor>& log_decay, const at::Tensor& visual_index,
                       const at::Tensor& visual_offsets, const at::Tensor& query_index, const at::Tensor& query_offsets,
                       c10::string_view function, c10::string_view pooling) {
  const at::NoGradGuard no_grad;
  const Pooling pool = mamba_pooling_of(pooling);
  const Mamba mamba(B, C, dt, log_decay, visual_index, visual_offsets, query_index, query_offsets,
                    function_of(function));
  if (mamba.function != Function::kIdentity || log_decay) return from_products(mamba, pool);
  return B.scalar_type() == at::kFloat ? one_pass<float>(mamba, pool) : one_pass<c10::BFloat16>(mamba, pool);
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) { m.impl("mamba_score", TORCH_FN(hybridprune::mamba_score)); }
