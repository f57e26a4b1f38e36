// x1 = x + gate residual, y = LayerNorm(x1) (1 + scale) + shift per row of [B, N, D], and the gradients. A modulation is
// a row per sample [B, D], such as a view of the condition [B, 6, D], plus an optional row of the block [D].
//
// PyTorch does this in five passes over memory forward and more backward; here every tensor is read once from memory, and
// again only from the L1 cache, and written once. All arithmetic is in fp32 and every result is rounded once; the
// statistics are centred sums over the stored x1. The gradients of the modulation are summed over CHUNK tokens at a time
// and then over the chunks, in a fixed order: no result depends on the number of threads.

#include "simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using pixart_fast::narrow;
using pixart_fast::widen;

// Rows per task of the forward: a thread is worth waking for some tens of microseconds of work.
constexpr int64_t GRAIN = 16;
// Tokens per partial sum of the backward: 3 more rows are written for every 32.
constexpr int64_t CHUNK = 32;

// A modulation: row b of `sample`, plus `row` where there is one; all `absent` where there is neither.
struct Modulation {
  at::Tensor sample_rows, block_row;
  const float* sample = nullptr;
  const float* row = nullptr;
  int64_t stride = 0;

  Modulation(const char* name, const std::optional<at::Tensor>& of_sample, const std::optional<at::Tensor>& of_block,
             int64_t B, int64_t D) {
    if (of_sample) {
      TORCH_CHECK(of_sample->sizes() == at::IntArrayRef({B, D}), name, " is [B, D] = [", B, ", ", D, "], not ",
                  of_sample->sizes());
      sample_rows = of_sample->to(at::kFloat);
      if (sample_rows.stride(1) != 1) sample_rows = sample_rows.contiguous();
      sample = sample_rows.const_data_ptr<float>();
      stride = sample_rows.stride(0);
    }
    if (of_block) {
      TORCH_CHECK(of_sample && of_block->sizes() == at::IntArrayRef({D}), name, "_row is [D] = [", D,
                  "] and comes with a ", name, ", not ", of_block->sizes());
      block_row = of_block->to(at::kFloat).contiguous();
      row = block_row.const_data_ptr<float>();
    }
  }

  INLINE void add_up(int64_t b, float base, int64_t D, float* out) const {
    if (sample == nullptr) {
      std::fill(out, out + D, 1.0f);
    } else if (row == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) out[i] = base + sample[b * stride + i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) out[i] = base + (sample[b * stride + i] + row[i]);
    }
  }
};

struct Sums {
  float distance, square;
};

// Σ (x - origin) and Σ (x - origin)² over a row. Each quarter of the row has its own running sums: with one for the whole
// row, every addition would wait out the latency of the one before.
template <class T>
INLINE Sums sum_row(const T* x, float origin, int64_t D) {
  const int64_t quarter = D / 4;
  float d0 = 0, d1 = 0, d2 = 0, d3 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3, s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    const float a = widen(x[i]) - origin, b = widen(x[i + quarter]) - origin;
    const float c = widen(x[i + 2 * quarter]) - origin, d = widen(x[i + 3 * quarter]) - origin;
    d0 += a, d1 += b, d2 += c, d3 += d;
    s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
  }
  for (int64_t i = 4 * quarter; i < D; ++i) {
    const float a = widen(x[i]) - origin;
    d0 += a, s0 += a * a;
  }
  return {(d0 + d1) + (d2 + d3), (s0 + s1) + (s2 + s3)};
}

struct Forward {
  const void* x;
  const void* residual;  // or none, and then no x1
  const Modulation &gate, &shift, &scale;
  float eps;
  int64_t N, D;
  void *x1, *y;
  float *mean, *rstd;
};

// `lines` holds three rows in fp32.
template <class T>
INLINE void forward_rows(const Forward& task, int64_t begin, int64_t end, float* lines) {
  const int64_t N = task.N, D = task.D;
  const auto count = static_cast<float>(D);
  const int64_t some = std::max<int64_t>(1, D / 4);
  float *gate = lines, *shift = lines + D, *scale = lines + 2 * D;
  for (int64_t row = begin; row < end; ++row) {
    if (row == begin || row % N == 0) {
      task.gate.add_up(row / N, 0.0f, D, gate);
      task.shift.add_up(row / N, 0.0f, D, shift);
      task.scale.add_up(row / N, 1.0f, D, scale);
    }
    const T* x = static_cast<const T*>(task.x) + row * D;
    if (task.residual != nullptr) {
      const T* residual = static_cast<const T*>(task.residual) + row * D;
      T* x1 = static_cast<T*>(task.x1) + row * D;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) narrow(widen(x[i]) + gate[i] * widen(residual[i]), x1[i]);
      x = x1;
    }
    // Centred at the mean of the first quarter, which is at most √3 standard deviations from that of the row (a little
    // more where 4 does not divide D): subtracting its square costs the variance no more than two bits.
    const float estimate = sum_row(x, 0.0f, some).distance / static_cast<float>(some);
    const Sums centred = sum_row(x, estimate, D);
    const float error = centred.distance / count;
    const float mean = estimate + error;
    const float rstd = 1.0f / std::sqrt(centred.square / count - error * error + task.eps);
    T* y = static_cast<T*>(task.y) + row * D;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) narrow((widen(x[i]) - mean) * rstd * scale[i] + shift[i], y[i]);
    task.mean[row] = mean;
    task.rstd[row] = rstd;
  }
}

FOR_EVERY_ISA void forward_fp32(const Forward& task, int64_t begin, int64_t end, float* lines) {
  forward_rows<float>(task, begin, end, lines);
}
FOR_EVERY_ISA void forward_bf16(const Forward& task, int64_t begin, int64_t end, float* lines) {
  forward_rows<uint16_t>(task, begin, end, lines);
}

struct Backward {
  const void* dx1;  // or none
  const void *dy, *x1;
  const float *mean, *rstd;
  const Modulation &scale, &gate;
  bool gated;            // or no gate, residual, dresidual and dgate
  const void* residual;
  int64_t N, D;
  void *dx, *dresidual;
  float *dgate, *dshift, *dscale;  // [B, chunks, D]
};

template <class T>
struct Row {
  const T *dy, *x1, *dx1, *residual;
  float mean, rstd;
  T *dx, *dresidual;

  INLINE float x_hat(int64_t i) const { return (widen(x1[i]) - mean) * rstd; }
};

// Two rows at once, so that their sums do not wait for one another, and the sums over tokens are loaded and stored once.
// The compiler makes vectors of this only while the two are written out.
template <class T, bool GATED>
INLINE void backward_pair(const Row<T> a, const Row<T> b, const float* scale, const float* gate, float* dgate,
                          float* dshift, float* dscale, int64_t D) {
  float a_g = 0, a_gx = 0, b_g = 0, b_gx = 0;
#pragma omp simd reduction(+ : a_g, a_gx, b_g, b_gx)
  for (int64_t i = 0; i < D; ++i) {
    const float g = widen(a.dy[i]) * scale[i], h = widen(b.dy[i]) * scale[i];
    a_g += g, a_gx += g * a.x_hat(i);
    b_g += h, b_gx += h * b.x_hat(i);
  }
  const float share = 1.0f / static_cast<float>(D);
  a_g *= share, a_gx *= share, b_g *= share, b_gx *= share;
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) {
    const float a_dy = widen(a.dy[i]), b_dy = widen(b.dy[i]), a_hat = a.x_hat(i), b_hat = b.x_hat(i);
    const float a_dx = widen(a.dx1[i]) + a.rstd * (a_dy * scale[i] - a_g - a_hat * a_gx);
    const float b_dx = widen(b.dx1[i]) + b.rstd * (b_dy * scale[i] - b_g - b_hat * b_gx);
    narrow(a_dx, a.dx[i]);
    narrow(b_dx, b.dx[i]);
    dshift[i] += a_dy + b_dy;
    dscale[i] += a_dy * a_hat + b_dy * b_hat;
    if (GATED) {
      narrow(gate[i] * a_dx, a.dresidual[i]);
      narrow(gate[i] * b_dx, b.dresidual[i]);
      dgate[i] += widen(a.residual[i]) * a_dx + widen(b.residual[i]) * b_dx;
    }
  }
}

// `zeros` and `unused` are rows for what is absent; `lines` holds two rows in fp32.
template <class T, bool GATED>
INLINE void backward_chunk(const Backward& task, int64_t b, int64_t chunk, const T* zeros, T* unused, float* lines) {
  const int64_t N = task.N, D = task.D, chunks = std::max<int64_t>(1, (N + CHUNK - 1) / CHUNK);
  float *scale = lines, *gate = lines + D;
  const int64_t part = (b * chunks + chunk) * D;
  float *dshift = task.dshift + part, *dscale = task.dscale + part, *dgate = GATED ? task.dgate + part : nullptr;
  task.scale.add_up(b, 1.0f, D, scale);
  std::fill(dshift, dshift + D, 0.0f);
  std::fill(dscale, dscale + D, 0.0f);
  if (GATED) {
    task.gate.add_up(b, 0.0f, D, gate);
    std::fill(dgate, dgate + D, 0.0f);
  }
  const auto row_of = [&](const void* data, int64_t row) {
    return data == nullptr ? zeros : static_cast<const T*>(data) + row * D;
  };
  const int64_t end = b * N + std::min(N, (chunk + 1) * CHUNK);
  for (int64_t row = b * N + chunk * CHUNK; row < end; row += 2) {
    Row<T> pair[2] = {{}, {zeros, zeros, zeros, zeros, 0.0f, 0.0f, unused, unused}};
    for (int64_t r = 0; r < std::min<int64_t>(2, end - row); ++r) {
      pair[r] = {row_of(task.dy, row + r), row_of(task.x1, row + r), row_of(task.dx1, row + r),
                 row_of(task.residual, row + r), task.mean[row + r], task.rstd[row + r],
                 static_cast<T*>(task.dx) + (row + r) * D,
                 GATED ? static_cast<T*>(task.dresidual) + (row + r) * D : nullptr};
    }
    backward_pair<T, GATED>(pair[0], pair[1], scale, gate, dgate, dshift, dscale, D);
  }
}

FOR_EVERY_ISA void backward_fp32(const Backward& task, int64_t b, int64_t chunk, const float* zeros, float* unused,
                                float* lines) {
  if (!task.gated) {
    backward_chunk<float, false>(task, b, chunk, zeros, unused, lines);
  } else {
    backward_chunk<float, true>(task, b, chunk, zeros, unused, lines);
  }
}
FOR_EVERY_ISA void backward_bf16(const Backward& task, int64_t b, int64_t chunk, const uint16_t* zeros, uint16_t* unused,
                                float* lines) {
  if (!task.gated) {
    backward_chunk<uint16_t, false>(task, b, chunk, zeros, unused, lines);
  } else {
    backward_chunk<uint16_t, true>(task, b, chunk, zeros, unused, lines);
  }
}

// Σ over the chunks of parts [B, chunks, D], in fp64: a large image has more chunks than fp32 sums in sequence without
// losing more than PyTorch, which sums in a tree. `line` is room for D.
FOR_EVERY_ISA void sum_chunks(const float* parts, int64_t b, int64_t chunks, int64_t D, float* total, double* line) {
  const float* part = parts + b * chunks * D;
  for (int64_t i = 0; i < D; ++i) line[i] = part[i];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    part += D;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) line[i] += part[i];
  }
  for (int64_t i = 0; i < D; ++i) total[b * D + i] = static_cast<float>(line[i]);
}

void check_rows(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3, "x is [B, N, D], not ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16, not ",
              x.scalar_type());
}

void check_like(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type(), name, " is like x, ", x.scalar_type(), " ",
              x.sizes(), ", not ", t.scalar_type(), " ", t.sizes());
}

// x, residual [B, N, D] fp32 or bf16, any strides; gate, shift, scale [B, D] and their rows [D], any floating dtype
// -> x1 like x, or [0] without a residual; y like x, contiguous; mean, rstd [B, N] fp32
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> modulated_layernorm(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& gate_row, const at::Tensor& shift, const std::optional<at::Tensor>& shift_row,
    const at::Tensor& scale, const std::optional<at::Tensor>& scale_row, double eps) {
  check_rows(x);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  TORCH_CHECK(residual || !gate, "a gate comes with a residual");
  if (residual) check_like("residual", *residual, x);
  const Modulation gates("gate", gate, gate_row, B, D), shifts("shift", shift, shift_row, B, D),
      scales("scale", scale, scale_row, B, D);

  const at::Tensor x_rows = x.contiguous(), residual_rows = residual ? residual->contiguous() : at::Tensor();
  at::Tensor x1 = residual ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor mean = at::empty({B, N}, x.options().dtype(at::kFloat)), rstd = at::empty({B, N}, mean.options());
  const Forward task{x_rows.const_data_ptr(),
                     residual ? residual_rows.const_data_ptr() : nullptr,
                     gates,
                     shifts,
                     scales,
                     static_cast<float>(eps),
                     N,
                     D,
                     x1.mutable_data_ptr(),
                     y.mutable_data_ptr(),
                     mean.mutable_data_ptr<float>(),
                     rstd.mutable_data_ptr<float>()};
  const bool fp32 = x.scalar_type() == at::kFloat;
  at::parallel_for(0, B * N, GRAIN, [&](int64_t begin, int64_t end) {
    std::vector<float> lines(3 * D);
    if (fp32) {
      forward_fp32(task, begin, end, lines.data());
    } else {
      forward_bf16(task, begin, end, lines.data());
    }
  });
  return {x1, y, mean, rstd};
}

// The gradients that arrive at x1 (or none) and y, the forward's x1 (x without a residual), mean, rstd and modulation;
// residual and gate where there was a gate -> dx, dresidual like x1, contiguous; dgate, dshift, dscale [B, D] fp32;
// dresidual and dgate [0] without a gate
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> modulated_layernorm_backward(
    const std::optional<at::Tensor>& dx1, const at::Tensor& dy, const at::Tensor& x1, const at::Tensor& mean,
    const at::Tensor& rstd, const at::Tensor& scale, const std::optional<at::Tensor>& scale_row,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& gate_row) {
  check_rows(x1);
  const int64_t B = x1.size(0), N = x1.size(1), D = x1.size(2);
  TORCH_CHECK(residual.has_value() == gate.has_value(), "residual and gate come together");
  check_like("dy", dy, x1);
  if (dx1) check_like("dx1", *dx1, x1);
  if (residual) check_like("residual", *residual, x1);
  for (const at::Tensor& statistic : {mean, rstd}) {
    TORCH_CHECK(statistic.sizes() == at::IntArrayRef({B, N}) && statistic.scalar_type() == at::kFloat,
                "mean and rstd are float32 [B, N] = [", B, ", ", N, "], not ", statistic.scalar_type(), " ",
                statistic.sizes());
  }
  const Modulation scales("scale", scale, scale_row, B, D), gates("gate", gate, gate_row, B, D);

  const at::Tensor dx1_rows = dx1 ? dx1->contiguous() : at::Tensor(), dy_rows = dy.contiguous();
  const at::Tensor x1_rows = x1.contiguous(), residual_rows = residual ? residual->contiguous() : at::Tensor();
  const at::Tensor means = mean.contiguous(), rstds = rstd.contiguous();
  const at::TensorOptions single = x1.options().dtype(at::kFloat);
  at::Tensor dx = at::empty(x1.sizes(), x1.options());
  at::Tensor dresidual = gate ? at::empty(x1.sizes(), x1.options()) : at::empty({0}, x1.options());
  // dgate, dshift, dscale
  const int64_t chunks = std::max<int64_t>(1, (N + CHUNK - 1) / CHUNK);
  std::array<at::Tensor, 3> parts{gate ? at::empty({B * chunks, D}, single) : at::empty({0}, single),
                                  at::empty({B * chunks, D}, single), at::empty({B * chunks, D}, single)};
  const Backward task{dx1 ? dx1_rows.const_data_ptr() : nullptr,
                      dy_rows.const_data_ptr(),
                      x1_rows.const_data_ptr(),
                      means.const_data_ptr<float>(),
                      rstds.const_data_ptr<float>(),
                      scales,
                      gates,
                      gate.has_value(),
                      residual ? residual_rows.const_data_ptr() : nullptr,
                      N,
                      D,
                      dx.mutable_data_ptr(),
                      dresidual.mutable_data_ptr(),
                      parts[0].mutable_data_ptr<float>(),
                      parts[1].mutable_data_ptr<float>(),
                      parts[2].mutable_data_ptr<float>()};
  const bool fp32 = x1.scalar_type() == at::kFloat;
  at::parallel_for(0, B * chunks, 1, [&](int64_t begin, int64_t end) {
    // Two rows for the modulation, then one of zeros and one for results without a use, in either dtype.
    std::vector<float> lines(4 * D);
    float *zeros = lines.data() + 2 * D, *unused = lines.data() + 3 * D;
    for (int64_t i = begin; i < end; ++i) {
      if (fp32) {
        backward_fp32(task, i / chunks, i % chunks, zeros, unused, lines.data());
      } else {
        backward_bf16(task, i / chunks, i % chunks, reinterpret_cast<uint16_t*>(zeros),
                      reinterpret_cast<uint16_t*>(unused), lines.data());
      }
    }
  });
  if (chunks == 1) return {dx, dresidual, parts[0], parts[1], parts[2]};

  std::array<at::Tensor, 3> totals{gate ? at::empty({B, D}, single) : at::empty({0}, single),
                                   at::empty({B, D}, single), at::empty({B, D}, single)};
  const int64_t first = gate ? 0 : 1;
  std::array<const float*, 3> from;
  std::array<float*, 3> to;
  for (int64_t i = first; i < 3; ++i) {
    from[i] = parts[i].const_data_ptr<float>();
    to[i] = totals[i].mutable_data_ptr<float>();
  }
  at::parallel_for(first * B, 3 * B, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> line(D);
    for (int64_t i = begin; i < end; ++i) sum_chunks(from[i / B], i % B, chunks, D, to[i / B], line.data());
  });
  return {dx, dresidual, totals[0], totals[1], totals[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(pixart_fast, CPU, m) {
  m.impl("modulated_layernorm", modulated_layernorm);
  m.impl("modulated_layernorm_backward", modulated_layernorm_backward);
}
