// o = softmax(q kᵀ / √d) v of every head, over the first lengths[b] keys of a sample, and its gradients.
//
// Made for few tokens, where a matrix product per head is too small for a BLAS. Sixteen image tokens lie side by side in
// the lanes of a vector, so that the softmax over keys needs no sum across lanes, a caption of any length wastes nothing,
// and both forward products and all five of the backward are one routine, `multiply`. Padding is never read. A head of a
// sample is one task, summed in a fixed order: results do not depend on the number of threads.

#include "simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

namespace {

using pixart_fast::narrow;
using pixart_fast::widen;

constexpr int64_t LANES = 16;
// Scratch matrices have rows in multiples of the rows that `multiply` takes at once.
constexpr int64_t ROWS = 8;
// Terms that are summed one after the other. In one go, over 256 keys, the output would err 1.3 times as much as PyTorch's.
constexpr int64_t BLOCK = 32;

// Natural vectors of WIDTH floats, at any address.
template <int WIDTH>
struct Natural {
  typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));
};

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// A tensor [B, T, H, d] of fp32 or bf16 with unit stride in d.
struct Heads {
  void* data;
  int64_t sample, token, head;
  bool fp32;

  explicit Heads(const at::Tensor& t)
      : data(t.data_ptr()), sample(t.stride(0)), token(t.stride(1)), head(t.stride(2)),
        fp32(t.scalar_type() == at::kFloat) {}
};

struct Task {
  Heads q, k, v, o;  // o is do in the backward
  Heads dq, dk, dv;  // unused in the forward
  float* lse;
  const int64_t* lengths;
  int64_t N, L, H, d, begin, end;

  INLINE int64_t length(int64_t b) const {
    return lengths == nullptr ? L : std::min(std::max<int64_t>(lengths[b], 0), L);
  }
};

// Floats on cache lines of their own.
struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;
Buffer zeros(int64_t size) {
  Buffer buffer(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64))));
  std::memset(buffer.get(), 0, size * sizeof(float));
  return buffer;
}

// The base of the softmax, e^(1/√d), as the logarithm log2(e) / √d in two parts.
struct Base {
  float high, low, lowest;

  explicit Base(int64_t d) {
    const double logarithm = 1.4426950408889634 / std::sqrt(static_cast<double>(d));
    high = static_cast<float>(logarithm);
    low = static_cast<float>(logarithm - high);
    lowest = -126.0f / high;
  }
};

// base^x to 1e-7 for x <= 0, and never below the smallest normal number. NaN stays NaN.
INLINE float power(const Base& base, float x) {
  x = x < base.lowest ? base.lowest : x;
  const float shifted = x * base.high + 12582912.0f;  // 1.5 · 2^23 leaves no room for a fraction
  // With an FMA the product is exact: rounding it would be the largest error of the softmax.
  const float fraction = (x * base.high - (shifted - 12582912.0f)) + x * base.low;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(12582912.0f) + 127;
  float series = 1.53458116e-4f;  // minimax of 2^x over [-1/2, 1/2]
  series = series * fraction + 1.33999312e-3f;
  series = series * fraction + 9.61848896e-3f;
  series = series * fraction + 5.55032878e-2f;
  series = series * fraction + 2.40226469e-1f;
  series = series * fraction + 6.93147206e-1f;
  series = series * fraction + 1.0f;
  return series * std::bit_cast<float>(exponent << 23);
}

// `count` rows of one head, from token `first`, to fp32 rows of stride `width`.
INLINE void load_rows(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t count, int64_t d, float* to,
                      int64_t width) {
  for (int64_t row = 0; row < count; ++row) {
    const int64_t offset = b * from.sample + (first + row) * from.token + h * from.head;
    float* out = to + row * width;
    if (from.fp32) {
      const float* in = static_cast<const float*>(from.data) + offset;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) out[c] = in[c];
    } else {
      const uint16_t* in = static_cast<const uint16_t*>(from.data) + offset;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) out[c] = widen(in[c]);
    }
  }
}

// The inverse, each row times its factor.
INLINE void store_rows(const float* from, int64_t width, const float* factors, const Heads& to, int64_t b, int64_t h,
                       int64_t first, int64_t count, int64_t d) {
  for (int64_t row = 0; row < count; ++row) {
    const int64_t offset = b * to.sample + (first + row) * to.token + h * to.head;
    const float* in = from + row * width;
    const float factor = factors[row];
    if (to.fp32) {
      float* out = static_cast<float*>(to.data) + offset;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) out[c] = in[c] * factor;
    } else {
      uint16_t* out = static_cast<uint16_t*>(to.data) + offset;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) narrow(in[c] * factor, out[c]);
    }
  }
}

INLINE void store_zeros(const Heads& to, int64_t b, int64_t h, int64_t first, int64_t end, int64_t d) {
  const int64_t size = to.fp32 ? sizeof(float) : sizeof(uint16_t);
  for (int64_t row = first; row < end; ++row) {
    const int64_t offset = b * to.sample + row * to.token + h * to.head;
    std::memset(static_cast<char*>(to.data) + offset * size, 0, d * size);
  }
}

// to[c][r] = from[r][c], both sizes multiples of 4.
INLINE void transpose(const float* from, int64_t from_width, int64_t rows, int64_t columns, float* to, int64_t to_width) {
  using Vector = Natural<4>::Vector;
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      const float* in = from + r * from_width + c;
      const Vector a0 = *reinterpret_cast<const Vector*>(in), a1 = *reinterpret_cast<const Vector*>(in + from_width);
      const Vector a2 = *reinterpret_cast<const Vector*>(in + 2 * from_width);
      const Vector a3 = *reinterpret_cast<const Vector*>(in + 3 * from_width);
      const Vector b0 = __builtin_shufflevector(a0, a1, 0, 4, 1, 5), b1 = __builtin_shufflevector(a2, a3, 0, 4, 1, 5);
      const Vector b2 = __builtin_shufflevector(a0, a1, 2, 6, 3, 7), b3 = __builtin_shufflevector(a2, a3, 2, 6, 3, 7);
      float* out = to + c * to_width + r;
      *reinterpret_cast<Vector*>(out) = __builtin_shufflevector(b0, b1, 0, 1, 4, 5);
      *reinterpret_cast<Vector*>(out + to_width) = __builtin_shufflevector(b0, b1, 2, 3, 6, 7);
      *reinterpret_cast<Vector*>(out + 2 * to_width) = __builtin_shufflevector(b2, b3, 0, 1, 4, 5);
      *reinterpret_cast<Vector*>(out + 3 * to_width) = __builtin_shufflevector(b2, b3, 2, 3, 6, 7);
    }
  }
}

// result[r][lane] (+)= Σ_s left(r, s) right[s][lane] for rows in multiples of ROWS, with left(r, s) at
// left[r row + s step]. Sums stay in registers: 8 rows of AVX-512, 4 of AVX2 and 2 of SSE are what fits beside the right.
template <int WIDTH, bool ADD>
INLINE void multiply(const float* left, int64_t row, int64_t step, const float* right, int64_t right_step,
                     int64_t steps, float* result, int64_t result_row, int64_t rows) {
  using Vector = typename Natural<WIDTH>::Vector;
  constexpr int64_t PARTS = LANES / WIDTH, TILE = WIDTH / 2;
  static_assert(ROWS % TILE == 0);
  for (int64_t first = 0; first < rows; first += TILE, left += TILE * row, result += TILE * result_row) {
    for (int64_t begin = 0; begin < steps; begin += BLOCK) {
      Vector sum[TILE][PARTS] = {};
      for (int64_t s = begin; s < std::min(steps, begin + BLOCK); ++s) {
        Vector lanes[PARTS];
#pragma GCC unroll 4
        for (int64_t p = 0; p < PARTS; ++p)
          lanes[p] = *reinterpret_cast<const Vector*>(right + s * right_step + p * WIDTH);
#pragma GCC unroll 8
        for (int64_t r = 0; r < TILE; ++r)
#pragma GCC unroll 4
          for (int64_t p = 0; p < PARTS; ++p) sum[r][p] += left[r * row + s * step] * lanes[p];
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < TILE; ++r)
#pragma GCC unroll 4
        for (int64_t p = 0; p < PARTS; ++p) {
          Vector& to = *reinterpret_cast<Vector*>(result + r * result_row + p * WIDTH);
          to = ADD || begin > 0 ? to + sum[r][p] : sum[r][p];
        }
    }
  }
}

// Scores to base^(score - maximum) in place; `maximum` and `sum` are those of each lane.
INLINE void exponentials(float* p, int64_t length, const Base& base, float* maximum, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < LANES; ++i) maximum[i] = p[i], sum[i] = 0;
  for (int64_t l = 1; l < length; ++l)
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) maximum[i] = p[l * LANES + i] > maximum[i] ? p[l * LANES + i] : maximum[i];
  for (int64_t begin = 0; begin < length; begin += BLOCK) {
    float block[LANES] = {};
    for (int64_t l = begin; l < std::min(length, begin + BLOCK); ++l)
#pragma omp simd
      for (int64_t i = 0; i < LANES; ++i) {
        const float weight = power(base, p[l * LANES + i] - maximum[i]);
        p[l * LANES + i] = weight;
        block[i] += weight;
      }
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) sum[i] += block[i];
  }
}

template <int WIDTH>
INLINE void forward_heads(const Task& task) {
  const int64_t N = task.N, H = task.H, d = task.d;
  const int64_t width = round_up(d, LANES), channels = round_up(d, ROWS), keys = round_up(task.L, ROWS);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const Base base(d);
  const Buffer scratch = zeros(2 * keys * width + keys * LANES + 3 * LANES * width);
  float* k = scratch.get();           // [keys, width]
  float* v = k + keys * width;        // [keys, width]
  float* p = v + keys * width;        // [keys, LANES]: scores, then their exponentials
  float* tokens = p + keys * LANES;   // [LANES, width]: q, then o
  float* q = tokens + LANES * width;  // [width, LANES]
  float* o = q + LANES * width;       // [width, LANES]
  for (int64_t head = task.begin; head < task.end; ++head) {
    const int64_t b = head / H, h = head % H, length = task.length(b);
    float* lse = task.lse + head * N;
    if (length == 0) {
      store_zeros(task.o, b, h, 0, N, d);
      std::fill(lse, lse + N, -std::numeric_limits<float>::infinity());
      continue;
    }
    load_rows(task.k, b, h, 0, length, d, k, width);
    load_rows(task.v, b, h, 0, length, d, v, width);
    for (int64_t first = 0; first < N; first += LANES) {
      const int64_t count = std::min(LANES, N - first);
      load_rows(task.q, b, h, first, count, d, tokens, width);
      transpose(tokens, width, LANES, round_up(d, 4), q, LANES);
      multiply<WIDTH, false>(k, width, 1, q, LANES, d, p, LANES, round_up(length, ROWS));
      float maximum[LANES], sum[LANES];
      exponentials(p, length, base, maximum, sum);
      multiply<WIDTH, false>(v, 1, width, p, LANES, length, o, LANES, channels);
      transpose(o, LANES, round_up(d, 4), LANES, tokens, width);
      for (int64_t i = 0; i < count; ++i) lse[first + i] = maximum[i] * scale + std::log(sum[i]);
      for (int64_t i = 0; i < LANES; ++i) sum[i] = 1.0f / sum[i];
      store_rows(tokens, width, sum, task.o, b, h, first, count, d);
    }
  }
}

template <int WIDTH>
INLINE void backward_heads(const Task& task) {
  const int64_t N = task.N, H = task.H, d = task.d;
  const int64_t width = round_up(d, LANES), channels = round_up(d, ROWS), keys = round_up(task.L, ROWS);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const Base base(d);
  const Buffer scratch = zeros(4 * keys * width + 2 * keys * LANES + 5 * LANES * width);
  float* k = scratch.get();                       // [keys, width], as v, dk and dv
  float* v = k + keys * width;
  float* dk = v + keys * width;
  float* dv = dk + keys * width;
  float* p = dv + keys * width;                   // [keys, LANES], as ds
  float* ds = p + keys * LANES;                   // the gradient of p, then of the scores
  float* q_tokens = ds + keys * LANES;            // [LANES, width], as do_tokens
  float* do_tokens = q_tokens + LANES * width;
  float* q_lanes = do_tokens + LANES * width;     // [width, LANES], as do_lanes and dq
  float* do_lanes = q_lanes + LANES * width;
  float* dq = do_lanes + LANES * width;
  float ones[LANES], scales[LANES];
  std::fill(ones, ones + LANES, 1.0f);
  std::fill(scales, scales + LANES, scale);
  for (int64_t head = task.begin; head < task.end; ++head) {
    const int64_t b = head / H, h = head % H, length = task.length(b), rows = round_up(length, ROWS);
    store_zeros(task.dk, b, h, length, task.L, d);
    store_zeros(task.dv, b, h, length, task.L, d);
    if (length == 0) {
      store_zeros(task.dq, b, h, 0, N, d);
      continue;
    }
    load_rows(task.k, b, h, 0, length, d, k, width);
    load_rows(task.v, b, h, 0, length, d, v, width);
    std::fill(dk, dk + 2 * keys * width, 0.0f);
    for (int64_t first = 0; first < N; first += LANES) {
      const int64_t count = std::min(LANES, N - first);
      // Lanes past the last token count for nothing: their do is 0.
      if (count < LANES) std::fill(q_tokens, q_tokens + 2 * LANES * width, 0.0f);
      load_rows(task.q, b, h, first, count, d, q_tokens, width);
      load_rows(task.o, b, h, first, count, d, do_tokens, width);
      transpose(q_tokens, width, LANES, round_up(d, 4), q_lanes, LANES);
      transpose(do_tokens, width, LANES, round_up(d, 4), do_lanes, LANES);
      multiply<WIDTH, false>(k, width, 1, q_lanes, LANES, d, p, LANES, rows);
      multiply<WIDTH, false>(v, width, 1, do_lanes, LANES, d, ds, LANES, rows);
      // Not from lse: its rounding, some 1e-7 of every weight, would be the largest error of the gradients.
      float maximum[LANES], sum[LANES], delta[LANES] = {};
      exponentials(p, length, base, maximum, sum);
      for (int64_t l = 0; l < length; ++l)
#pragma omp simd
        for (int64_t i = 0; i < LANES; ++i) delta[i] += p[l * LANES + i] * ds[l * LANES + i];
      for (int64_t i = 0; i < LANES; ++i) sum[i] = 1.0f / sum[i], delta[i] *= sum[i];  // delta = Σ_c o do
      for (int64_t l = 0; l < length; ++l)
#pragma omp simd
        for (int64_t i = 0; i < LANES; ++i) {
          p[l * LANES + i] *= sum[i];
          ds[l * LANES + i] = p[l * LANES + i] * (ds[l * LANES + i] - delta[i]);
        }
      multiply<WIDTH, false>(k, 1, width, ds, LANES, length, dq, LANES, channels);
      for (int64_t c = 0; c < width; c += LANES) {
        multiply<WIDTH, true>(ds, LANES, 1, q_tokens + c, width, LANES, dk + c, width, rows);
        multiply<WIDTH, true>(p, LANES, 1, do_tokens + c, width, LANES, dv + c, width, rows);
      }
      transpose(dq, LANES, round_up(d, 4), LANES, q_tokens, width);
      store_rows(q_tokens, width, scales, task.dq, b, h, first, count, d);
    }
    for (int64_t l = 0; l < length; ++l) {
      store_rows(dk + l * width, width, scales, task.dk, b, h, l, 1, d);
      store_rows(dv + l * width, width, ones, task.dv, b, h, l, 1, d);
    }
  }
}

DISPATCH(run_forward, forward_heads, Task)
DISPATCH(run_backward, backward_heads, Task)

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lengths) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.sizes().slice(2) == k.sizes().slice(2) &&
                  v.sizes() == k.sizes(),
              "q is [B, N, H, d], k and v are [B, L, H, d], not ", q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  const at::ScalarType dtype = q.scalar_type();
  TORCH_CHECK((dtype == at::kFloat || dtype == at::kBFloat16) && k.scalar_type() == dtype && v.scalar_type() == dtype,
              "q, k and v are all float32 or all bfloat16, not ", dtype, ", ", k.scalar_type(), " and ",
              v.scalar_type());
  TORCH_CHECK(!lengths || (lengths->scalar_type() == at::kLong && lengths->sizes() == at::IntArrayRef({q.size(0)})),
              "lengths are int64 [B] = [", q.size(0), "], not ", lengths->scalar_type(), " ", lengths->sizes());
}

at::Tensor unit_stride(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

template <class Run>
void for_every_head(Task task, int64_t B, const Run& run) {
  at::parallel_for(0, B * task.H, 1, [&](int64_t begin, int64_t end) {
    Task part = task;
    part.begin = begin, part.end = end;
    run(part);
  });
}

// q [B, N, H, d]; k, v [B, L, H, d] fp32 or bf16, any strides; lengths int64 [B] or none
// -> o like q, contiguous; lse [B, H, N] fp32, the logarithm of Σ exp(q k / √d)
std::tuple<at::Tensor, at::Tensor> cross_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   const std::optional<at::Tensor>& lengths) {
  check(q, k, v, lengths);
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2);
  const at::Tensor q_rows = unit_stride(q), k_rows = unit_stride(k), v_rows = unit_stride(v);
  const at::Tensor counts = lengths ? lengths->contiguous() : at::Tensor();
  at::Tensor o = at::empty(q.sizes(), q.options()), lse = at::empty({B, H, N}, q.options().dtype(at::kFloat));
  const Heads out(o);
  for_every_head({Heads(q_rows), Heads(k_rows), Heads(v_rows), out, out, out, out, lse.data_ptr<float>(),
                  lengths ? counts.data_ptr<int64_t>() : nullptr, N, k.size(1), H, q.size(3), 0, 0},
                 B, [](const Task& task) { run_forward(task); });
  return {o, lse};
}

// The gradient of o, the arguments and the results of the forward -> dq, dk, dv, contiguous; 0 in the padding
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_attention_backward(
    const at::Tensor& d_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& o,
    const at::Tensor& lse, const std::optional<at::Tensor>& lengths) {
  check(q, k, v, lengths);
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2);
  TORCH_CHECK(d_o.sizes() == q.sizes() && d_o.scalar_type() == q.scalar_type() && lse.is_contiguous() &&
                  lse.sizes() == at::IntArrayRef({B, H, N}) && lse.scalar_type() == at::kFloat,
              "do is like q, ", q.scalar_type(), " ", q.sizes(), ", and lse the forward's, not ", d_o.scalar_type(), " ",
              d_o.sizes(), " and ", lse.scalar_type(), " ", lse.sizes());
  const at::Tensor q_rows = unit_stride(q), k_rows = unit_stride(k), v_rows = unit_stride(v), do_rows = unit_stride(d_o);
  const at::Tensor counts = lengths ? lengths->contiguous() : at::Tensor();
  at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()), dv = at::empty(k.sizes(), k.options());
  for_every_head({Heads(q_rows), Heads(k_rows), Heads(v_rows), Heads(do_rows), Heads(dq), Heads(dk), Heads(dv),
                  lse.data_ptr<float>(), lengths ? counts.data_ptr<int64_t>() : nullptr, N, k.size(1), H, q.size(3), 0,
                  0},
                 B, [](const Task& task) { run_backward(task); });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(pixart_fast, CPU, m) {
  m.impl("cross_attention", cross_attention);
  m.impl("cross_attention_backward", cross_attention_backward);
}
