// Products of a frozen int8, int4 or bfloat16 matrix with a few float32 rows, limited by memory bandwidth.
//
// The int8 products are exact integers. A row of activations becomes integers X of `bits` bits (16, or 8: "int8-dynamic"),
// X is cut into signed bytes, and bytes are multiplied and summed without rounding. So the result of a row depends neither
// on the other rows, nor on the number of threads, nor on the processor.
//
// Layout: panels of 16 output rows, [rows/16][columns/4][16][4], so that a core reads one stream of memory and every
// 64 bytes are multiplied by the same four activations. Weights are stored unsigned (q + 128), because the processors'
// byte products need one unsigned operand; the 128 adds 128 times the sum of X, which is subtracted at the end.
//
// cpu.py compiles this file on first use and has the fallback; reference.py has the formulas in torch. M rows, O outputs,
// K inputs.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using at::Tensor;
using std::optional;

typedef uint8_t Bytes __attribute__((vector_size(64)));    // 16 rows of 4 weights
typedef int32_t Ints __attribute__((vector_size(64)));     // one sum of 16 rows
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(128)));
typedef double Doubles __attribute__((vector_size(128)));
typedef int8_t Chars __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t LANES = 16, GROUP = 32;
constexpr int32_t MAX_ACTIVATION_16 = 0x7f7f;    // what two signed bytes hold
constexpr int32_t MAX_ACTIVATION_8 = 127;
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 8;  // rows that share one load of the weights; more do not fit the registers
#else
constexpr int MAX_ROWS = 2;
#endif

template <typename T, typename P> static inline T load(const P* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}

// Prefetches the weights 4 KB ahead, into the second-level cache, which allows more outstanding requests. For one row the
// hardware prefetcher is fast enough.
template <int M, typename P> static inline void prefetch(const P* now) {
  if constexpr (M > 1) __builtin_prefetch((const char*)now + 4096, 0, 2);
}

// The first `width` numbers of a panel, the others 0. (A fixed size is one instruction.)
static inline Floats lanes(const float* from, int64_t width) {
  if (from && width == LANES) return load<Floats>(from);
  Floats value = {};
  if (from) memcpy(&value, from, width * sizeof(float));
  return value;
}
static inline void put(float* to, Floats value, int64_t width) {
  if (width == LANES)
    memcpy(to, &value, sizeof(value));
  else
    memcpy(to, &value, width * sizeof(float));
}

// The largest |x|; infinite or NaN where one of them is.
static float peak_of(const float* x, int64_t K) {
  int32_t most = 0;  // the bits of |x| sort as the numbers do, infinities and NaN last
  for (int64_t k = 0; k < K; k++) most = std::max(most, load<int32_t>(x + k) & 0x7fffffff);
  return load<float>(&most);
}

// bfloat16 is the upper half of a float32.
static inline float widen_one(uint16_t half) {
  const uint32_t word = uint32_t(half) << 16;
  return load<float>(&word);
}
static inline Floats widen(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// sum[r] + w[r][0..3] . x[0..3], with w unsigned and x signed. AVX2 adds pairs of products in 16 bits, which DIGIT bits of x
// cannot overflow.
#if defined(__AVX512VNNI__)
constexpr int DIGIT = 8;
static inline Ints dot4(Ints sum, Bytes w, int32_t x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
#elif defined(__AVX2__)
constexpr int DIGIT = 7;
static inline Ints dot4(Ints sum, Bytes w, int32_t x) {
  __m256i sums[2], weights[2];
  memcpy(sums, &sum, 64);
  memcpy(weights, &w, 64);
  for (int i = 0; i < 2; i++) {
    __m256i pairs = _mm256_maddubs_epi16(weights[i], _mm256_set1_epi32(x));
    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return load<Ints>(sums);
}
#else
constexpr int DIGIT = 8;
static inline Ints dot4(Ints sum, Bytes w, int32_t x) {
  const int8_t* four = (const int8_t*)&x;
  for (int r = 0; r < 16; r++)
    for (int i = 0; i < 4; i++) sum[r] += int32_t(w[4 * r + i]) * four[i];
  return sum;
}
#endif

// To the nearest integer, ties to even, as rintf does; |x| < 2^23.
static inline Ints rounded(Floats x) {
  const Floats size = (Floats)((Ints)x & 0x7fffffff);
  const Ints whole = __builtin_convertvector((size + 0x1p23f) - 0x1p23f, Ints);
  return x < 0 ? -whole : whole;
}

// The tile that row m of M belongs to in in_tiles: its first row and its number of rows, a power of 2 up to `most`.
struct Tile {
  int64_t first = 0, rows;
  Tile(int64_t m, int64_t M, int64_t most) : rows(most) {
    for (; m >= first + (M - first) / rows * rows; rows /= 2) first += (M - first) / rows * rows;
    first += (m - first) / rows * rows;
  }
};

// Rows of x as integers X = x / unit, each cut into D signed digits of BITS bits, the lowest first. The rows of a tile are
// one stream, [K/4][rows][D][4]: 24 parallel streams are slower.
template <int D, int BITS> struct Digits {
  const int64_t M, K, most;
  const std::unique_ptr<int8_t[]> bytes;
  std::vector<double> unit;
  std::vector<int64_t> sum;

  // The digits d of the columns k to k + 3 of row m.
  int8_t* four(int64_t m, int64_t d, int64_t k) {
    const Tile tile(m, M, most);
    return bytes.get() + (tile.first * K + k * tile.rows + (m - tile.first) * 4) * D + d * 4;
  }

  Digits(const float* x, int64_t M, int64_t K, int64_t most, int32_t largest)
      : M(M), K(K), most(most), bytes(std::make_unique_for_overwrite<int8_t[]>(M * D * K)), unit(M), sum(M) {
    constexpr int32_t HALF = 1 << (BITS - 1), MASK = (1 << BITS) - 1;
    int32_t halves = 0;  // added, so that no digit is negative and each has its own bits
    for (int d = 0; d < D; d++) halves += HALF << (BITS * d);
    at::parallel_for(0, M, 1 + 8192 / K, [&](int64_t from, int64_t to) {
      for (int64_t m = from; m < to; m++) {
        const float* row = x + m * K;
        const float peak = peak_of(row, K);
        if (!std::isfinite(peak)) {
          unit[m] = NAN;
          continue;
        }
        const double step = double(peak) / largest;
        const float scale = step == 0 ? 0.f : float(std::min(1 / step, 3e38));
        unit[m] = scale == 0 ? 0 : 1 / double(scale);
        Longs total = {};
        int8_t* out = four(m, 0, 0);
        const int64_t apart = four(m, 0, 4) - out;
        const auto cut = [&](int64_t k, int64_t n) {
          Floats some = {};
          memcpy(&some, row + k, n * sizeof(float));
          const Ints X = rounded(some * scale);
          total += __builtin_convertvector(X, Longs);
          for (int d = 0; d < D; d++) {
            const Chars digit = __builtin_convertvector(((X + halves) >> (BITS * d) & MASK) - HALF, Chars);
            for (int64_t i = 0; i < n / 4; i++) memcpy(out + (k / 4 + i) * apart + d * 4, (char*)&digit + 4 * i, 4);
          }
        };
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) cut(k, LANES);
        if (k < K) cut(k, K - k);
        for (int64_t r = 0; r < LANES; r++) sum[m] += total[r];
      }
    });
  }
};

// y[m][16] of M rows and one panel.
template <int M, int D>
static void int8_tile(const uint8_t* w, const int8_t* x, const double* unit, const int64_t* x_sum, const float* scale,
                      const float* bias, float* y, int64_t stride, int64_t width, int64_t K) {
  Ints sums[M][D] = {};
  for (int64_t k = 0; k < K; k += 4) {
    prefetch<M>(w + k * LANES);
    const Bytes weights = load<Bytes>(w + k * LANES);
    for (int m = 0; m < M; m++)
      for (int d = 0; d < D; d++) sums[m][d] = dot4(sums[m][d], weights, load<int32_t>(x + (k * M + m * 4) * D + d * 4));
  }
  const Doubles scales = __builtin_convertvector(lanes(scale, width), Doubles);
  const Floats biases = lanes(bias, width);
  for (int m = 0; m < M; m++) {
    Doubles total = Doubles{} - 128.0 * double(x_sum[m]);  // integers of less than 53 bits: exact
    for (int d = 0; d < D; d++) total += __builtin_convertvector(sums[m][d], Doubles) * double(1 << (DIGIT * d));
    put(y + m * stride, __builtin_convertvector(total * (unit[m] * scales), Floats) + biases, width);
  }
}

// Calls tile(number of rows as a constant, first row) until all M rows are done.
template <int R, typename F> static void in_tiles(int64_t M, int64_t from, const F& tile) {
  for (; from + R <= M; from += R) tile(std::integral_constant<int, R>(), from);
  if constexpr (R > 1) in_tiles<R / 2>(M, from, tile);
}

template <int D>
static void int8_product(const Tensor& x, at::TensorList panels, at::TensorList scales, const float* const* biases,
                         Tensor& y, int32_t largest) {
  const int64_t K = panels[0].size(1) * 4, O = y.size(-1), M = y.numel() / O;
  const Digits<D, DIGIT> digits(x.const_data_ptr<float>(), M, K, MAX_ROWS, largest);
  float* out = y.mutable_data_ptr<float>();
  int64_t all = 0;
  for (const Tensor& some : panels) all += some.size(0);
  at::parallel_for(0, all, 1, [&](int64_t from, int64_t to) {
    int64_t first = 0, column = 0;  // of matrix i: its first panel among all, its column of y
    for (size_t i = 0; i < panels.size(); first += panels[i].size(0), column += scales[i].numel(), i++) {
      const uint8_t* w = panels[i].const_data_ptr<uint8_t>();
      const float *scale = scales[i].const_data_ptr<float>(), *bias = biases[i];
      for (int64_t p = std::max(from - first, int64_t(0)); p < std::min(to - first, panels[i].size(0)); p++)
        in_tiles<MAX_ROWS>(M, 0, [&](auto rows, int64_t m) {
          int8_tile<rows, D>(w + p * K * LANES, digits.bytes.get() + m * D * K, &digits.unit[m], &digits.sum[m],
                             scale + p * LANES, bias ? bias + p * LANES : nullptr, out + m * O + column + p * LANES, O,
                             std::min(LANES, scales[i].numel() - p * LANES), K);
        });
    }
  });
}

static const float* data_or_null(const optional<Tensor>& bias) {
  return bias ? bias->const_data_ptr<float>() : nullptr;
}

// x contiguous, its rows padded with zeros to the K of the panels.
static Tensor padded_rows(const Tensor& x, int64_t K) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, "float32 rows are needed, these are ", x.scalar_type());
  TORCH_CHECK(x.size(-1) <= K && K - x.size(-1) < 4, "rows of ", K, " numbers are needed, these have ", x.size(-1));
  return x.size(-1) == K ? x.contiguous() : at::constant_pad_nd(x, {0, K - x.size(-1)});
}

static Tensor output_for(const Tensor& x, int64_t O) {
  auto shape = x.sizes().vec();
  shape.back() = O;
  return at::empty(shape, x.options());
}

// x (..., K) times the int8 matrices in `panels`, concatenated, scaled per output row: (..., sum of O). `bits`, 16 or 8, is
// the precision of an activation. Matrices that read the same x share its digits and one parallel loop.
static Tensor int8_linears(const Tensor& x_any, at::TensorList panels, at::TensorList scales,
                           const c10::List<optional<Tensor>>& biases, int64_t bits) {
  TORCH_CHECK(bits == 16 || bits == 8, "bits is ", bits, "; it can be 16 or 8");
  TORCH_CHECK(panels[0].size(1) <= 16384, "the sums of more than 65,536 products do not fit 32 bits");
  const Tensor x = padded_rows(x_any, panels[0].size(1) * 4);
  int64_t O = 0;
  std::vector<const float*> b;
  for (size_t i = 0; i < panels.size(); i++) {
    O += scales[i].numel();
    b.push_back(data_or_null(biases.get(i)));
  }
  Tensor y = output_for(x, O);
  if (bits == 16)
    int8_product<DIGIT == 8 ? 2 : 3>(x, panels, scales, b.data(), y, MAX_ACTIVATION_16);
  else
    int8_product<DIGIT == 8 ? 1 : 2>(x, panels, scales, b.data(), y, MAX_ACTIVATION_8);
  return y;
}

static Tensor int8_linear(const Tensor& x, const Tensor& panels, const Tensor& scale, const optional<Tensor>& bias,
                          int64_t bits) {
  return int8_linears(x, {panels}, {scale}, c10::List<optional<Tensor>>({bias}), bits);
}

// The bfloat16 matrix in `panels` [rows/16][K][16] times float32 rows; sums in float32, in the same order for every M.
template <int M>
static void bf16_tile(const uint16_t* w, const float* x, const float* bias, float* y, int64_t stride, int64_t width,
                      int64_t K) {
  Floats sums[M][2] = {};
  for (int64_t k = 0; k < K; k += 2) {
    prefetch<M>(w + k * LANES);
    for (int i = 0; i < 2; i++) {
      const Floats weights = widen(w + (k + i) * LANES);
      for (int m = 0; m < M; m++) sums[m][i] += weights * x[m * K + k + i];
    }
  }
  const Floats biases = lanes(bias, width);
  for (int m = 0; m < M; m++) put(y + m * stride, sums[m][0] + sums[m][1] + biases, width);
}

static Tensor bf16_linear(const Tensor& x_any, const Tensor& panels, const optional<Tensor>& bias, int64_t O) {
  const int64_t K = panels.size(1), M = x_any.numel() / x_any.size(-1);
  const Tensor x = padded_rows(x_any, K);
  Tensor y = output_for(x, O);
  const uint16_t* w = (const uint16_t*)panels.const_data_ptr();
  const float *in = x.const_data_ptr<float>(), *b = data_or_null(bias);
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, panels.size(0), 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++)
      in_tiles<MAX_ROWS>(M, 0, [&](auto rows, int64_t m) {
        bf16_tile<rows>(w + p * K * LANES, in + m * K, b ? b + p * LANES : nullptr, out + m * O + p * LANES, O,
                        std::min(LANES, O - p * LANES), K);
      });
  });
  return y;
}

// Rows of x as signed bytes with a scale for each group of 32 columns, which costs int4 weights nothing (docs/weights.md).
// The bytes are in the order of Digits<1>.
struct Groups {
  const int64_t M, K, most, count;
  const std::unique_ptr<int8_t[]> bytes;
  std::vector<float> scale;
  std::vector<int32_t> offset;  // what the 8 in q + 8 adds to a sum, negated

  Groups(const float* x, int64_t M, int64_t K, int64_t most)
      : M(M), K(K), most(most), count(K / GROUP), bytes(std::make_unique_for_overwrite<int8_t[]>(M * K)),
        scale(M * count), offset(M * count) {
    at::parallel_for(0, M, 1 + 8192 / K, [&](int64_t from, int64_t to) {
      for (int64_t m = from; m < to; m++) {
        const Tile tile(m, M, most);
        int8_t* out = bytes.get() + tile.first * K + (m - tile.first) * 4;
        for (int64_t g = 0; g < count; g++) {
          const float *in = x + m * K + g * GROUP, peak = peak_of(in, GROUP);
          const bool is_finite = std::isfinite(peak);
          const float inverse = peak == 0 || !is_finite ? 0 : std::min(127 / peak, 3e38f);
          Ints sum = {};
          for (int64_t k = 0; k < GROUP; k += LANES) {
            const Ints X = is_finite ? rounded(load<Floats>(in + k) * inverse) : Ints{};
            sum += X;
            const Chars digits = __builtin_convertvector(X, Chars);
            for (int64_t i = 0; i < 4; i++) memcpy(out + (g * GROUP + k + 4 * i) * tile.rows, (char*)&digits + 4 * i, 4);
          }
          scale[m * count + g] = is_finite ? peak / 127 : NAN;
          for (int64_t r = 0; r < LANES; r++) offset[m * count + g] -= 8 * sum[r];
        }
      }
    });
  }
};

// The int4 matrix in `panels` [rows/16][K/32][4][64]: byte 4r+i of piece j holds the weights q + 8 of row r at columns
// 8j+i (its low half) and 8j+4+i of the group. `scale` [rows/16][K/32][16], bfloat16: one a row and group of 32 columns.
template <int M>
static void int4_tile(const uint8_t* w, const uint16_t* scale, const int8_t* x, const float* x_scale, const int32_t* offset,
                      const float* bias, float* y, int64_t stride, int64_t width, int64_t K) {
  Floats totals[M] = {};
  for (int64_t g = 0; g < K / GROUP; g++) {
    Ints sums[M];
    for (int m = 0; m < M; m++) sums[m] = Ints{} + offset[m * (K / GROUP) + g];
    for (int j = 0; j < 4; j++) {
      prefetch<M>(w + (g * 4 + j) * 64);
      const Bytes both = load<Bytes>(w + (g * 4 + j) * 64), low = both & 15, high = both >> 4;
      for (int m = 0; m < M; m++) {
        const int8_t* four = x + (g * GROUP + 8 * j) * M + m * 4;
        sums[m] = dot4(dot4(sums[m], low, load<int32_t>(four)), high, load<int32_t>(four + 4 * M));
      }
    }
    const Floats scales = widen(scale + g * LANES);
    for (int m = 0; m < M; m++)
      totals[m] += __builtin_convertvector(sums[m], Floats) * (scales * x_scale[m * (K / GROUP) + g]);
  }
  const Floats biases = lanes(bias, width);
  for (int m = 0; m < M; m++) put(y + m * stride, totals[m] + biases, width);
}

static Tensor int4_linear(const Tensor& x_any, const Tensor& panels, const Tensor& scale, const optional<Tensor>& bias,
                          int64_t O) {
  const int64_t count = panels.size(1), K = count * GROUP, M = x_any.numel() / x_any.size(-1);
  const Tensor x = padded_rows(x_any, K);
  Tensor y = output_for(x, O);
  const Groups groups(x.const_data_ptr<float>(), M, K, MAX_ROWS);
  const uint8_t* w = panels.const_data_ptr<uint8_t>();
  const uint16_t* s = (const uint16_t*)scale.const_data_ptr();
  const float* b = data_or_null(bias);
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, panels.size(0), 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++)
      in_tiles<MAX_ROWS>(M, 0, [&](auto rows, int64_t m) {
        int4_tile<rows>(w + p * count * 256, s + p * count * LANES, groups.bytes.get() + m * K, &groups.scale[m * count],
                        &groups.offset[m * count], b ? b + p * LANES : nullptr, out + m * O + p * LANES, O,
                        std::min(LANES, O - p * LANES), K);
      });
  });
  return y;
}

// Packing: the layouts of cpu.py and the rounding of reference.py, in one pass over the weights. -----------------------

// Calls row(weights as float32, panel, lane) for every row of a float32 or bfloat16 matrix, panels in parallel.
template <typename F> static void each_row(const Tensor& weight, const F& row) {
  const Tensor all = weight.contiguous();
  const int64_t O = all.size(0), K = all.size(1);
  at::parallel_for(0, (O + LANES - 1) / LANES, 1, [&](int64_t from, int64_t to) {
    std::vector<float> copy(K);
    for (int64_t o = from * LANES; o < std::min(O, to * LANES); o++) {
      if (all.scalar_type() == at::kBFloat16) {
        const uint16_t* halves = (const uint16_t*)all.const_data_ptr() + o * K;
        for (int64_t k = 0; k < K; k++) copy[k] = widen_one(halves[k]);
        row(copy.data(), o / LANES, o % LANES);
      } else {
        row(all.const_data_ptr<float>() + o * K, o / LANES, o % LANES);
      }
    }
  });
}

// float32 or bfloat16 (O, K) -> panels and scales of int8; the numbers are those of `quantize_int8` in reference.py.
static std::tuple<Tensor, Tensor> int8_pack(const Tensor& weight) {
  const int64_t O = weight.size(0), K = weight.size(1), steps = (K + 3) / 4;
  Tensor panels = at::full({(O + LANES - 1) / LANES, steps, LANES, 4}, 128, at::kByte), scales = at::empty({O}, at::kFloat);
  uint8_t* out = panels.mutable_data_ptr<uint8_t>();
  float* scale_of = scales.mutable_data_ptr<float>();
  each_row(weight, [&](const float* w, int64_t p, int64_t lane) {
    int exponent;
    const float fraction = std::frexp(peak_of(w, K) / 127.f, &exponent);
    float scale = std::ldexp(std::ceil(fraction * 65536.f), exponent - 16);
    if (scale == 0) scale = 1;
    scale_of[p * LANES + lane] = scale;
    std::vector<uint8_t> raised(4 * steps, 128);
    for (int64_t k = 0; k < K; k++)
      raised[k] = uint8_t(int32_t(std::min(127.f, std::max(-127.f, __builtin_rintf(w[k] / scale)))) + 128);
    for (int64_t step = 0; step < steps; step++) memcpy(out + ((p * steps + step) * LANES + lane) * 4, &raised[4 * step], 4);
  });
  return {panels, scales};
}

// The same for int4; the numbers are those of `quantize_int4` in reference.py. K is a multiple of 32.
static std::tuple<Tensor, Tensor> int4_pack(const Tensor& weight) {
  const int64_t O = weight.size(0), K = weight.size(1), groups = K / GROUP, P = (O + LANES - 1) / LANES;
  TORCH_CHECK(K % GROUP == 0, "int4 needs rows of a multiple of 32 numbers, these have ", K);
  Tensor panels = at::full({P, groups, 4, 64}, 0x88, at::kByte), scales = at::zeros({P, groups, LANES}, at::kBFloat16);
  uint8_t* out = panels.mutable_data_ptr<uint8_t>();
  at::BFloat16* scale_of = (at::BFloat16*)scales.mutable_data_ptr();
  each_row(weight, [&](const float* w, int64_t p, int64_t lane) {
    for (int64_t g = 0; g < groups; g++, w += GROUP) {
      float peak = 0;
      for (int64_t k = 0; k < GROUP; k++)
        if (std::abs(w[k]) > std::abs(peak) || w[k] != w[k]) peak = w[k];  // NaN stays
      at::BFloat16 rounded(peak / -8.f);
      if (float(rounded) == 0) rounded = 1.f;
      scale_of[(p * groups + g) * LANES + lane] = rounded;
      uint8_t* bytes = out + (p * groups + g) * 256 + lane * 4;
      for (int64_t j = 0; j < 4; j++)
        for (int64_t i = 0; i < 4; i++) {
          auto q = [&](float v) { return int(std::min(7.f, std::max(-8.f, __builtin_rintf(v / float(rounded))))) + 8; };
          bytes[j * 64 + i] = uint8_t(q(w[8 * j + i]) | q(w[8 * j + 4 + i]) << 4);
        }
    }
  });
  return {panels, scales};
}

// float32 or bfloat16 (O, K) -> panels of bfloat16.
static Tensor bf16_pack(const Tensor& weight) {
  const int64_t O = weight.size(0), K = weight.size(1), padded = K + K % 2;
  Tensor panels = at::zeros({(O + LANES - 1) / LANES, padded, LANES}, at::kBFloat16);
  at::BFloat16* out = (at::BFloat16*)panels.mutable_data_ptr();
  each_row(weight, [&](const float* w, int64_t p, int64_t lane) {
    for (int64_t k = 0; k < K; k++) out[(p * padded + k) * LANES + lane] = w[k];
  });
  return panels;
}

// The other operations of a decoding step, where starting a torch operation costs more than computing it. --------------

// e^x, off by one or two units in the last place: 2^n times the Taylor series of the remainder.
static inline Floats exp_of(Floats x) {
  x = x < -87.f ? Floats{} - 87.f : x > 88.f ? Floats{} + 88.f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
  const Floats whole = __builtin_convertvector(n, Floats), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats sum = r * (1.f / 5040) + 1.f / 720;
  for (float term : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) sum = sum * r + term;
  return sum * (Floats)((n + 127) << 23);
}

// silu(gate) * up; a row of x holds its gates, then as many ups. (torch's silu takes 60 us for a row of 4864.)
static Tensor swiglu(const Tensor& x_any) {
  const Tensor x = x_any.contiguous();
  const int64_t F = x.size(-1) / 2, M = x.numel() / (2 * F);
  TORCH_CHECK(x.scalar_type() == at::kFloat && F % LANES == 0, "float32 rows of twice a multiple of 16 are needed");
  Tensor y = output_for(x, F);
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, M, 8, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; m++)
      for (int64_t k = 0; k < F; k += LANES) {
        const Floats gate = load<Floats>(in + m * 2 * F + k), up = load<Floats>(in + m * 2 * F + F + k);
        const Floats result = gate / (1.f + exp_of(-gate)) * up;
        memcpy(out + m * F + k, &result, sizeof(result));
      }
  });
  return y;
}

// x / sqrt(mean(x^2) + eps) * weight over the last dimension.
static Tensor rms_norm(const Tensor& x_any, const Tensor& weight, double eps) {
  const Tensor x = x_any.contiguous();
  const int64_t D = weight.numel();
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.size(-1) == D, "float32 rows of ", D, " numbers are needed");
  Tensor y = at::empty_like(x);
  const float *in = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel() / D, 16, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; m++) {
      double sums[8] = {};
      for (int64_t k = 0; k < D; k++) sums[k % 8] += double(in[m * D + k]) * in[m * D + k];
      double sum = 0;
      for (double part : sums) sum += part;
      const float by = float(1 / std::sqrt(sum / D + eps));
      for (int64_t k = 0; k < D; k++) out[m * D + k] = w[k] * (in[m * D + k] * by);
    }
  });
  return y;
}

// x[k] cos[k] + x[k + K/2 mod K] sin[k]: RoPE, with the signs in `sin` (rotate in qwen.py).
static void rotate(const float* x, const float* cos, const float* sin, float* out, int64_t K) {
  for (int64_t k = 0; k < K / 2; k++) out[k] = x[k] * cos[k] + x[k + K / 2] * sin[k];
  for (int64_t k = K / 2; k < K; k++) out[k] = x[k] * cos[k] + x[k - K / 2] * sin[k];
}

static inline float sum_of(Floats x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  const Eight eight = load<Eight>(&x) + load<Eight>((float*)&x + 8);
  const Four four = load<Four>(&eight) + load<Four>((float*)&eight + 4);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Attention of one head's query (K, a multiple of 16 and at most 256) over `end` positions, `step` numbers apart: out (K).
static inline __attribute__((always_inline)) void attend(const float* query, const float* keys, const float* values,
                                                         float* out, int64_t end, int64_t step, int64_t K,
                                                         std::vector<float>& scores) {
  scores.assign((end + LANES - 1) / LANES * LANES, -INFINITY);
  const float factor = float(1 / std::sqrt(double(K)));
  float most = -INFINITY, total = 0;
  for (int64_t t = 0; t < end; t++) {
    Floats products = {};
    for (int64_t k = 0; k < K; k += LANES) products += load<Floats>(query + k) * load<Floats>(keys + t * step + k);
    scores[t] = sum_of(products) * factor;
    most = std::max(most, scores[t]);
  }
  for (size_t t = 0; t < scores.size(); t += LANES) {
    const Floats weights = exp_of(load<Floats>(&scores[t]) - most);
    memcpy(&scores[t], &weights, sizeof(weights));
    total += sum_of(weights);
  }
  Floats sums[16] = {};
  for (int64_t t = 0; t < end; t++)
    for (int64_t k = 0; k < K; k += LANES) sums[k / LANES] += load<Floats>(values + t * step + k) * scores[t];
  for (int64_t k = 0; k < K; k += LANES) put(out + k, sums[k / LANES] / total, LANES);
}

// Attention for one new token per row, (B, H K): qkv (B, (H + 2 G) K) are its projected queries, keys and values; cos and sin
// (B, K). Row b is written to position starts[b] of slot slots[b] in keys and values (S, G, C, K), and attends to that slot
// up to there. No row depends on another.
static Tensor attend_token(const Tensor& qkv_any, const Tensor& cos_any, const Tensor& sin_any, const Tensor& keys,
                           const Tensor& values, at::IntArrayRef slots, at::IntArrayRef starts) {
  const Tensor qkv = qkv_any.contiguous(), cos = cos_any.contiguous(), sin = sin_any.contiguous();
  const int64_t B = slots.size(), G = keys.size(1), K = keys.size(3), H = qkv.numel() / B / K - 2 * G, share = H / G;
  TORCH_CHECK(qkv.scalar_type() == at::kFloat && cos.scalar_type() == at::kFloat && keys.scalar_type() == at::kFloat &&
                  values.scalar_type() == at::kFloat && K % LANES == 0 && K <= 256 && cos.numel() == B * K &&
                  keys.stride(3) == 1 && values.strides() == keys.strides() && H > 0,
              "float32 heads of a multiple of 16 numbers are needed, at most 256");
  Tensor y = at::empty({B, H * K}, qkv.options());
  std::vector<float> queries(B * H * K);
  float *all_keys = keys.mutable_data_ptr<float>(), *all_values = values.mutable_data_ptr<float>();
  const int64_t slot_step = keys.stride(0), head_step = keys.stride(1), step = keys.stride(2);
  for (int64_t b = 0; b < B; b++) {
    TORCH_CHECK(starts[b] < keys.size(2) && slots[b] < keys.size(0), "row ", b, " has no such position");
    const float *row = qkv.const_data_ptr<float>() + b * (H + 2 * G) * K, *c = cos.const_data_ptr<float>() + b * K,
                *s = sin.const_data_ptr<float>() + b * K;
    const int64_t place = slots[b] * slot_step + starts[b] * step;
    for (int64_t h = 0; h < H; h++) rotate(row + h * K, c, s, &queries[(b * H + h) * K], K);
    for (int64_t g = 0; g < G; g++) {
      rotate(row + (H + g) * K, c, s, all_keys + place + g * head_step, K);
      memcpy(all_values + place + g * head_step, row + (H + G + g) * K, K * sizeof(float));
    }
  }
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, B * H, 1, [&](int64_t from, int64_t to) {
    std::vector<float> scores;
    for (int64_t i = from; i < to; i++) {
      const int64_t b = i / H, first = slots[b] * slot_step + i % H / share * head_step;
      const auto head = [&](int64_t size) __attribute__((always_inline)) {
        attend(&queries[i * K], all_keys + first, all_values + first, out + i * K, starts[b] + 1, step, size, scores);
      };
      K == 64 ? head(64) : head(K);  // a constant size is twice as fast
    }
  });
  return y;
}

TORCH_LIBRARY(mmllm, m) {
  m.def("int8_linear(Tensor x, Tensor panels, Tensor scale, Tensor? bias, int bits) -> Tensor");
  m.def("int8_linears(Tensor x, Tensor[] panels, Tensor[] scales, Tensor?[] biases, int bits) -> Tensor");
  m.def("bf16_linear(Tensor x, Tensor panels, Tensor? bias, int out_features) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor panels, Tensor scale, Tensor? bias, int out_features) -> Tensor");
  m.def("int8_pack(Tensor weight) -> (Tensor, Tensor)");
  m.def("int4_pack(Tensor weight) -> (Tensor, Tensor)");
  m.def("bf16_pack(Tensor weight) -> Tensor");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("attend_token(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int[] slots, int[] starts)"
        " -> Tensor");
}

TORCH_LIBRARY_IMPL(mmllm, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("int8_linears", int8_linears);
  m.impl("bf16_linear", bf16_linear);
  m.impl("int4_linear", int4_linear);
  m.impl("int8_pack", int8_pack);
  m.impl("int4_pack", int4_pack);
  m.impl("bf16_pack", bf16_pack);
  m.impl("swiglu", swiglu);
  m.impl("rms_norm", rms_norm);
  m.impl("attend_token", attend_token);
}
