// A sum that gives every column the same bits wherever it lies; a reduction of torch's may not.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>

namespace hybridprune {

// Sum over the first dimension, of at least one row, by halves: the order depends on the number of rows alone.
inline at::Tensor sum_of_rows(at::Tensor rows) {
  while (rows.size(0) > 1) {
    const int64_t half = rows.size(0) / 2;
    const at::Tensor added = at::add(rows.narrow(0, 0, half), rows.narrow(0, half, half));
    if (rows.size(0) % 2 == 1) added.select(0, 0).add_(rows.select(0, 2 * half));
    rows = added;
  }
  return rows.select(0, 0);
}

}  // namespace hybridprune
