// y = (x - mean) rstd (1 + scale) + shift per row of x [B, N, D], with one shift and scale row per sample.
//
// PyTorch does this in three passes over memory (layer_norm, multiply, add); here a row is read once from memory and twice
// more from the L1 cache. The statistics are centred sums in fp32, and y is rounded once. Rows are independent, so the
// result does not depend on the number of threads. mean and rstd are kept for the backward.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

// One function body compiled for AVX-512, AVX2 and the baseline; the loader takes the best that the machine has.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FOR_EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_ISA
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

// Rows per task: a thread is worth waking for some tens of microseconds of work.
constexpr int64_t GRAIN = 16;

INLINE float widen(uint16_t bf16) { return std::bit_cast<float>(static_cast<uint32_t>(bf16) << 16); }
INLINE uint16_t narrow(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? nearest_even : 0x7fc0);
}

struct Sums {
  float distance, square;
};

// Σ (x - origin) and Σ (x - origin)² over a row. Each quarter of the row has its own running sums: with one for the whole
// row, every addition would wait out the latency of the one before.
INLINE Sums sum_row(const float* x, float origin, int64_t D) {
  const int64_t quarter = D / 4;
  float d0 = 0, d1 = 0, d2 = 0, d3 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3, s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    const float a = x[i] - origin, b = x[i + quarter] - origin;
    const float c = x[i + 2 * quarter] - origin, d = x[i + 3 * quarter] - origin;
    d0 += a, d1 += b, d2 += c, d3 += d;
    s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
  }
  for (int64_t i = 4 * quarter; i < D; ++i) {
    const float a = x[i] - origin;
    d0 += a, s0 += a * a;
  }
  return {(d0 + d1) + (d2 + d3), (s0 + s1) + (s2 + s3)};
}

// y may be x.
INLINE void normalize_row(const float* x, const float* shift, const float* scale, float eps, int64_t D, float* y,
                          float* mean_out, float* rstd_out) {
  const auto count = static_cast<float>(D);
  const float estimate = sum_row(x, 0.0f, D).distance / count;
  // The distances to the estimate sum to its rounding error: a mean as good as fp32 can hold.
  const Sums centred = sum_row(x, estimate, D);
  const float error = centred.distance / count;
  const float mean = estimate + error;
  const float rstd = 1.0f / std::sqrt(centred.square / count - error * error + eps);
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) y[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
  *mean_out = mean;
  *rstd_out = rstd;
}

FOR_EVERY_ISA void normalize_fp32(const float* x, const float* shift, const float* scale, float eps, int64_t begin,
                                  int64_t end, int64_t N, int64_t D, float* y, float* mean, float* rstd) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / N;
    normalize_row(x + row * D, shift + sample * D, scale + sample * D, eps, D, y + row * D, mean + row, rstd + row);
  }
}

// `line` [D] holds the row in fp32.
FOR_EVERY_ISA void normalize_bf16(const uint16_t* x, const float* shift, const float* scale, float eps, int64_t begin,
                                  int64_t end, int64_t N, int64_t D, uint16_t* y, float* mean, float* rstd,
                                  float* line) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / N;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) line[i] = widen(x[row * D + i]);
    normalize_row(line, shift + sample * D, scale + sample * D, eps, D, line, mean + row, rstd + row);
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) y[row * D + i] = narrow(line[i]);
  }
}

// x [B, N, D] fp32 or bf16; shift, scale [B, D] of any floating dtype -> y like x, contiguous; mean, rstd [B, N] fp32.
std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layernorm(const at::Tensor& x, const at::Tensor& shift,
                                                                   const at::Tensor& scale, double eps) {
  TORCH_CHECK(x.dim() == 3, "x is [B, N, D], not ", x.sizes());
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  TORCH_CHECK(shift.sizes() == at::IntArrayRef({B, D}) && scale.sizes() == at::IntArrayRef({B, D}),
              "shift and scale are [B, D] = [", B, ", ", D, "], not ", shift.sizes(), " and ", scale.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16, not ",
              x.scalar_type());

  const at::Tensor rows = x.contiguous();
  const at::Tensor shift_rows = shift.to(at::kFloat).contiguous(), scale_rows = scale.to(at::kFloat).contiguous();
  at::Tensor y = at::empty_like(rows);
  at::Tensor mean = at::empty({B, N}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);

  const float* shift_ptr = shift_rows.const_data_ptr<float>();
  const float* scale_ptr = scale_rows.const_data_ptr<float>();
  float* mean_ptr = mean.mutable_data_ptr<float>();
  float* rstd_ptr = rstd.mutable_data_ptr<float>();
  const void* x_ptr = rows.const_data_ptr();
  void* y_ptr = y.mutable_data_ptr();
  const bool fp32 = x.scalar_type() == at::kFloat;
  const auto epsilon = static_cast<float>(eps);
  at::parallel_for(0, B * N, GRAIN, [&](int64_t begin, int64_t end) {
    if (fp32) {
      normalize_fp32(static_cast<const float*>(x_ptr), shift_ptr, scale_ptr, epsilon, begin, end, N, D,
                     static_cast<float*>(y_ptr), mean_ptr, rstd_ptr);
    } else {
      std::vector<float> line(D);
      normalize_bf16(static_cast<const uint16_t*>(x_ptr), shift_ptr, scale_ptr, epsilon, begin, end, N, D,
                     static_cast<uint16_t*>(y_ptr), mean_ptr, rstd_ptr, line.data());
    }
  });
  return {y, mean, rstd};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixart_fast, m) {
  m.def("modulated_layernorm(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pixart_fast, CPU, m) { m.impl("modulated_layernorm", modulated_layernorm); }
