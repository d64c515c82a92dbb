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
#include <omp.h>
#include <span>
#include <torch/custom_class.h>
#include <torch/library.h>
#include <variant>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using at::Tensor;
using std::optional;
using std::to_string;  // numbers in messages: with libstdc++ linked statically, streams write none

typedef uint8_t Bytes __attribute__((vector_size(64)));    // 16 rows of 4 weights
typedef int32_t Ints __attribute__((vector_size(64)));     // one sum of 16 rows
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(128)));
typedef double Doubles __attribute__((vector_size(128)));
typedef int8_t Chars __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t LANES = 16, GROUP = 32;
constexpr int CUTS = 12;  // int4 scales to choose from
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

// Prefetches the weights 8 KB ahead, into the second-level cache, which allows more outstanding requests. The hardware
// prefetcher stops at the end of a page.
static inline void prefetch(const void* now) {
  __builtin_prefetch((const char*)now + 8192, 0, 2);
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

static inline float sum_of(Floats x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  const Eight eight = load<Eight>(&x) + load<Eight>((float*)&x + 8);
  const Four four = load<Four>(&eight) + load<Four>((float*)&eight + 4);
  return (four[0] + four[2]) + (four[1] + four[3]);
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
  int64_t M;
  const int64_t K, most;
  const int32_t largest;
  const std::unique_ptr<int8_t[]> bytes;
  std::vector<double> unit;
  std::vector<int64_t> sum;

  // The digits d of the columns k to k + 3 of row m.
  int8_t* four(int64_t m, int64_t d, int64_t k) {
    const Tile tile(m, M, most);
    return bytes.get() + (tile.first * K + k * tile.rows + (m - tile.first) * 4) * D + d * 4;
  }

  Digits(int64_t M, int64_t K, int64_t most, int32_t largest)
      : M(M), K(K), most(most), largest(largest), bytes(std::make_unique_for_overwrite<int8_t[]>(M * D * K)), unit(M), sum(M) {}

  void set(const float* row, int64_t m) {
    constexpr int32_t HALF = 1 << (BITS - 1), MASK = (1 << BITS) - 1;
    int32_t halves = 0;  // added, so that no digit is negative and each has its own bits
    for (int d = 0; d < D; d++) halves += HALF << (BITS * d);
    const float peak = peak_of(row, K);
    const double step = double(peak) / largest;
    const float scale = step == 0 || !std::isfinite(peak) ? 0.f : float(std::min(1 / step, 3e38));
    unit[m] = !std::isfinite(peak) ? NAN : scale == 0 ? 0 : 1 / double(scale);
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
    sum[m] = 0;
    for (int64_t r = 0; r < LANES; r++) sum[m] += total[r];
  }
};

// y[m][16] of M rows and one panel.
template <int M, int D>
static void int8_tile(const uint8_t* w, const int8_t* x, const double* unit, const int64_t* x_sum, const float* scale,
                      const float* bias, float* y, int64_t stride, int64_t width, int64_t K) {
  Ints sums[M][D] = {};
  for (int64_t k = 0; k < K; k += 4) {
    prefetch(w + k * LANES);
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

static const float* data_or_null(const optional<Tensor>& bias) {
  return bias ? bias->const_data_ptr<float>() : nullptr;
}

// x contiguous, its rows padded with zeros to the K of the panels.
static Tensor padded_rows(const Tensor& x, int64_t K) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, "float32 rows are needed, these are ", toString(x.scalar_type()));
  TORCH_CHECK(x.size(-1) <= K && K - x.size(-1) < 4, "rows of ", to_string(K), " numbers are needed, these have ",
              to_string(x.size(-1)));
  return x.size(-1) == K ? x.contiguous() : at::constant_pad_nd(x, {0, K - x.size(-1)});
}

static Tensor output_for(const Tensor& x, int64_t O) {
  auto shape = x.sizes().vec();
  shape.back() = O;
  return at::empty(shape, x.options());
}

// The bfloat16 matrix in `panels` [rows/16][K][16] times float32 rows; sums in float32, in the same order for every M.
template <int M>
static void bf16_tile(const uint16_t* w, const float* x, const float* bias, float* y, int64_t stride, int64_t width,
                      int64_t K) {
  Floats sums[M][2] = {};
  for (int64_t k = 0; k < K; k += 2) {
    prefetch(w + k * LANES);
    for (int i = 0; i < 2; i++) {
      const Floats weights = widen(w + (k + i) * LANES);
      for (int m = 0; m < M; m++) sums[m][i] += weights * x[m * K + k + i];
    }
  }
  const Floats biases = lanes(bias, width);
  for (int m = 0; m < M; m++) put(y + m * stride, sums[m][0] + sums[m][1] + biases, width);
}

// Rows of x as signed bytes with a scale for each group of 32 columns, which costs int4 weights nothing (docs/weights.md).
// The bytes are in the order of Digits<1>.
struct Groups {
  int64_t M;
  const int64_t K, most, count;
  const std::unique_ptr<int8_t[]> bytes;
  std::vector<float> scale;
  std::vector<int32_t> offset;  // what the 8 in q + 8 adds to a sum, negated

  Groups(int64_t M, int64_t K, int64_t most)
      : M(M), K(K), most(most), count(K / GROUP), bytes(std::make_unique_for_overwrite<int8_t[]>(M * K)), scale(M * count),
        offset(M * count) {}

  void set(const float* row, int64_t m) {
    const Tile tile(m, M, most);
    int8_t* out = bytes.get() + tile.first * K + (m - tile.first) * 4;
    for (int64_t g = 0; g < count; g++) {
      const float *in = row + g * GROUP, peak = peak_of(in, GROUP);
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
      offset[m * count + g] = 0;
      for (int64_t r = 0; r < LANES; r++) offset[m * count + g] -= 8 * sum[r];
    }
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
      prefetch(w + (g * 4 + j) * 64);
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

// A packed matrix (O, K); its panels tell of which kind.
struct Matrix {
  Tensor panels;
  const void* scale;  // float32 for int8, bfloat16 for int4
  const float* bias;
  int64_t O, K;

  Matrix(const Tensor& panels, const optional<Tensor>& scale, const optional<Tensor>& bias, int64_t O)
      : panels(panels), scale(scale ? scale->const_data_ptr() : nullptr), bias(data_or_null(bias)), O(O),
        K(panels.size(1) * (!scale ? 1 : is_int4() ? GROUP : 4)) {
    TORCH_CHECK(panels.size(1) <= 16384, "the sums of more than 65,536 products do not fit 32 bits");
  }
  bool is_int4() const { return panels.size(2) == 4; }
  int64_t count() const { return panels.size(0); }
  const uint8_t* panel(int64_t p) const { return (const uint8_t*)panels.const_data_ptr() + p * (panels.nbytes() / count()); }
  const float* bias_at(int64_t p) const { return bias ? bias + p * LANES : nullptr; }
  int64_t width(int64_t p) const { return std::min(LANES, O - p * LANES); }
};

// Activations in the form that a product reads: as they are for bfloat16, in bytes for the others.
struct Plain {
  int64_t M;
  const int64_t K;
  const std::unique_ptr<float[]> x;
  Plain(int64_t M, int64_t K) : M(M), K(K), x(std::make_unique_for_overwrite<float[]>(M * K)) {}
  void set(const float* row, int64_t m) { memcpy(&x[m * K], row, K * sizeof(float)); }
};
typedef Digits<DIGIT == 8 ? 1 : 2, DIGIT> Digits8;
typedef Digits<DIGIT == 8 ? 2 : 3, DIGIT> Digits16;
typedef std::variant<Plain, Groups, Digits8, Digits16> Rows;

static Rows rows_for(const Matrix& matrix, int64_t M, int64_t bits) {
  if (!matrix.scale) return Rows(std::in_place_type<Plain>, M, matrix.K);
  if (matrix.is_int4()) return Rows(std::in_place_type<Groups>, M, matrix.K, MAX_ROWS);
  if (bits == 8) return Rows(std::in_place_type<Digits8>, M, matrix.K, MAX_ROWS, MAX_ACTIVATION_8);
  TORCH_CHECK(bits == 16, "bits is ", to_string(bits), "; it can be 16 or 8");
  return Rows(std::in_place_type<Digits16>, M, matrix.K, MAX_ROWS, MAX_ACTIVATION_16);
}

template <int R> static void tile(const Matrix& a, int64_t p, const Plain& x, int64_t m, float* y, int64_t stride) {
  bf16_tile<R>((const uint16_t*)a.panel(p), &x.x[m * x.K], a.bias_at(p), y, stride, a.width(p), a.K);
}
template <int R> static void tile(const Matrix& a, int64_t p, const Groups& x, int64_t m, float* y, int64_t stride) {
  int4_tile<R>(a.panel(p), (const uint16_t*)a.scale + p * x.count * LANES, x.bytes.get() + m * x.K, &x.scale[m * x.count],
               &x.offset[m * x.count], a.bias_at(p), y, stride, a.width(p), a.K);
}
template <int R, int D, int BITS>
static void tile(const Matrix& a, int64_t p, const Digits<D, BITS>& x, int64_t m, float* y, int64_t stride) {
  int8_tile<R, D>(a.panel(p), x.bytes.get() + m * D * x.K, &x.unit[m], &x.sum[m], (const float*)a.scale + p * LANES, a.bias_at(p),
                  y, stride, a.width(p), a.K);
}

// The panels `from` to `to` of several matrices that read the same rows; y (M, sum of O).
static void product(std::span<const Matrix> matrices, const Rows& rows, float* y, int64_t from, int64_t to) {
  int64_t stride = 0, first = 0, column = 0;
  for (const Matrix& a : matrices) stride += a.O;
  for (const Matrix& a : matrices) {
    std::visit([&](const auto& x) {
      for (int64_t p = std::max(from - first, int64_t(0)); p < std::min(to - first, a.count()); p++)
        in_tiles<MAX_ROWS>(x.M, 0, [&](auto size, int64_t m) {
          tile<size>(a, p, x, m, y + m * stride + column + p * LANES, stride);
        });
    }, rows);
    first += a.count(), column += a.O;
  }
}

static Tensor apply(const Tensor& x_any, const Matrix& matrix, int64_t bits) {
  const int64_t M = x_any.numel() / x_any.size(-1);
  const Tensor x = padded_rows(x_any, matrix.K);
  Tensor y = output_for(x, matrix.O);
  Rows rows = rows_for(matrix, M, bits);
  at::parallel_for(0, M, 1 + 8192 / matrix.K, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; m++)
      std::visit([&](auto& form) { form.set(x.const_data_ptr<float>() + m * matrix.K, m); }, rows);
  });
  at::parallel_for(0, matrix.count(), 1, [&](int64_t from, int64_t to) {
    product({&matrix, 1}, rows, y.mutable_data_ptr<float>(), from, to);
  });
  return y;
}

// x (..., K) times an int8 matrix: (..., O). `bits`, 16 or 8, is the precision of an activation.
static Tensor int8_linear(const Tensor& x, const Tensor& panels, const Tensor& scale, const optional<Tensor>& bias,
                          int64_t bits) {
  return apply(x, Matrix(panels, scale, bias, scale.numel()), bits);
}

static Tensor bf16_linear(const Tensor& x, const Tensor& panels, const optional<Tensor>& bias, int64_t O) {
  return apply(x, Matrix(panels, {}, bias, O), 0);
}

static Tensor int4_linear(const Tensor& x, const Tensor& panels, const Tensor& scale, const optional<Tensor>& bias,
                          int64_t O) {
  return apply(x, Matrix(panels, scale, bias, O), 0);
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
  TORCH_CHECK(K % GROUP == 0, "int4 needs rows of a multiple of 32 numbers, these have ", to_string(K));
  Tensor panels = at::full({P, groups, 4, 64}, 0x88, at::kByte), scales = at::zeros({P, groups, LANES}, at::kBFloat16);
  uint8_t* out = panels.mutable_data_ptr<uint8_t>();
  at::BFloat16* scale_of = (at::BFloat16*)scales.mutable_data_ptr();
  each_row(weight, [&](const float* w, int64_t p, int64_t lane) {
    for (int64_t g = 0; g < groups; g++, w += GROUP) {
      float peak = 0, least = 0;
      for (int64_t k = 0; k < GROUP; k++)
        if (std::abs(w[k]) > std::abs(peak) || w[k] != w[k]) peak = w[k];  // NaN stays
      at::BFloat16 best(1.f);
      const auto whole = [&](int64_t k, float scale) {  // q of 16 columns, ties to even
        Floats q = load<Floats>(w + k) / scale + 0x1.8p23f - 0x1.8p23f;
        q = q < -8.f ? Floats{} - 8.f : q;
        return q > 7.f ? Floats{} + 7.f : q;
      };
      for (int cut = 0; cut < CUTS; cut++) {
        at::BFloat16 scale(peak / -(8 + cut / 4.f));
        if (float(scale) == 0) scale = 1.f;
        const auto off = [&](int64_t k) {
          return (Floats)((Ints)(whole(k, scale) * float(scale) - load<Floats>(w + k)) & ~0xfff);
        };
        const Floats low = off(0), high = off(LANES);
        const float error = sum_of(low * low + high * high);
        if (cut > 0 && !(error < least)) continue;
        least = error;
        best = scale;
      }
      scale_of[(p * groups + g) * LANES + lane] = best;
      Chars q[2];
      for (int64_t h = 0; h < 2; h++) q[h] = __builtin_convertvector(whole(h * LANES, best) + 8.f, Chars);
      uint8_t* bytes = out + (p * groups + g) * 256 + lane * 4;
      for (int64_t j = 0; j < 4; j++)
        for (int64_t i = 0; i < 4; i++)
          bytes[j * 64 + i] = uint8_t(q[j / 2][8 * (j % 2) + i] | q[j / 2][8 * (j % 2) + 4 + i] << 4);
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

// One pass of rows through the language model. --------------------------------------------------------------------------

// e^x, off by one or two units in the last place: 2^n times the Taylor series of the remainder.
static inline Floats exp_of(Floats x) {
  x = x < -87.f ? Floats{} - 87.f : x > 88.f ? Floats{} + 88.f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
  const Floats whole = __builtin_convertvector(n, Floats), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats sum = r * (1.f / 5040) + 1.f / 720;
  for (float term : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) sum = sum * r + term;
  return sum * (Floats)((n + 127) << 23);
}

// silu(gate) * up of F gates and as many ups.
static void swiglu(const float* gate_up, float* out, int64_t F) {
  for (int64_t k = 0; k < F; k += LANES) {
    const int64_t width = std::min(LANES, F - k);
    const Floats gate = lanes(gate_up + k, width), up = lanes(gate_up + F + k, width);
    put(out + k, gate / (1.f + exp_of(-gate)) * up, width);
  }
}

// x / sqrt(mean(x^2) + eps) * weight. `out` may be x.
static void rms_norm(const float* x, const float* weight, float* out, int64_t D, double eps) {
  double sums[8] = {};
  for (int64_t k = 0; k < D; k++) sums[k % 8] += double(x[k]) * x[k];
  double sum = 0;
  for (double part : sums) sum += part;
  const float by = float(1 / std::sqrt(sum / D + eps));
  for (int64_t k = 0; k < D; k++) out[k] = weight[k] * (x[k] * by);
}

// x[k] cos[k] + x[k + K/2 mod K] sin[k], in place: RoPE, with the signs in `sin` (rotate in qwen.py).
static void rotate(float* x, const float* cos, const float* sin, int64_t K) {
  for (int64_t k = 0; k < K / 2; k++) {
    const float low = x[k], high = x[k + K / 2];
    x[k] = low * cos[k] + high * sin[k];
    x[k + K / 2] = high * cos[k + K / 2] + low * sin[k + K / 2];
  }
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

// The language model of qwen.py on packed matrices, for `PerSlot` caches: tokens of answers and of prompts alike are rows. No row
// depends on another but through the cache.
struct Step : torch::CustomClassHolder {
  std::vector<Tensor> held;         // what the pointers point into
  std::vector<Matrix> matrices;     // q, k, v, o, gate, up, down of each layer, then the head
  std::vector<const float*> norms;  // two a layer, the last one, then those of the queries and keys of each layer, if any
  const int64_t head_dim, bits, layers;
  const double eps;

  Step(std::vector<Tensor> panels, std::vector<optional<Tensor>> scales, std::vector<optional<Tensor>> biases,
       std::vector<int64_t> widths, std::vector<Tensor> norms_, int64_t head_dim, int64_t bits, double eps)
      : held(norms_), head_dim(head_dim), bits(bits), layers(panels.size() / 7), eps(eps) {
    for (size_t i = 0; i < panels.size(); i++) {
      matrices.emplace_back(panels[i], scales[i], biases[i], widths[i]);
      for (const auto& tensor : {scales[i], biases[i]})
        if (tensor) held.push_back(*tensor);
    }
    for (const Tensor& norm : norms_) norms.push_back(norm.const_data_ptr<float>());
  }

  Tensor run(const Tensor& x_MD, std::vector<int64_t> slots, std::vector<int64_t> starts, std::vector<int64_t> keep,
             const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values);
};

// What the threads of one `run` share.
struct Pass {
  const Step& model;
  const std::vector<int64_t>&slots, &starts, &keep;
  const Tensor &cos, &sin, &keys, &values;
  const int64_t M = slots.size(), N = keep.size(), K = model.head_dim, D = model.matrices[3].O, H = model.matrices[0].O / K,
                G = model.matrices[1].O / K, F = model.matrices[4].O, qkv_width = (H + 2 * G) * K;
  Rows in = rows_for(model.matrices[0], M, model.bits), heads = rows_for(model.matrices[3], M, model.bits),
       gated = rows_for(model.matrices[6], M, model.bits), final = rows_for(model.matrices.back(), N, model.bits);
  float *x, *out, *last, *attended;  // (M, D), (M, the widest product), (N, D), (M, columns of `heads`)

  static int64_t columns(const Rows& rows) { return std::visit([](auto& form) { return form.K; }, rows); }
};

// One of the threads, all of which do the same phases and wait for each other after each.
struct Worker {
  Pass& pass;
  const Step& model = pass.model;
  const int64_t t = omp_get_thread_num(), T = omp_get_num_threads();
  std::vector<float> row = std::vector<float>(std::max(
      {Pass::columns(pass.in), Pass::columns(pass.heads), Pass::columns(pass.gated), Pass::columns(pass.final)}));
  std::vector<float> scores{};

  void each(int64_t count, const auto& body) {
    for (int64_t i = count * t / T; i < count * (t + 1) / T; i++) body(i);
#pragma omp barrier
  }

  void set(Rows& rows, const float* from, int64_t m) { std::visit([&](auto& form) { form.set(from, m); }, rows); }

  // Rows times `count` matrices from `first` on, side by side.
  void multiply(int64_t first, int64_t count, const Rows& rows, float* to) {
    int64_t panels = 0;
    for (int64_t i = first; i < first + count; i++) panels += model.matrices[i].count();
    product({&model.matrices[first], size_t(count)}, rows, to, panels * t / T, panels * (t + 1) / T);
#pragma omp barrier
  }

  // Adds `more` to rows of x, and their norms are what the next product reads.
  void norm(int64_t rows, float* x, const float* more, const float* weight, Rows& to) {
    const int64_t D = pass.D;
    each(rows, [&](int64_t m) {
      for (int64_t k = 0; more && k < D; k++) x[m * D + k] += more[m * D + k];
      std::fill(row.begin(), row.end(), 0.f);
      rms_norm(x + m * D, weight, row.data(), D, model.eps);
      set(to, row.data(), m);
    });
  }

  // From queries, keys and values in `out` to the attention of each row in `heads`; the cache takes the new keys and values.
  void attention(int64_t layer) {
    const int64_t K = pass.K, H = pass.H, G = pass.G, width = Pass::columns(pass.heads), first = 2 * model.layers + 1;
    const auto strides = pass.keys.strides();
    float* keys = pass.keys.mutable_data_ptr<float>() + layer * strides[0];
    float* values = pass.values.mutable_data_ptr<float>() + layer * strides[0];
    each(pass.M, [&](int64_t m) {
      float* qkv = pass.out + m * pass.qkv_width;
      const int64_t start = pass.starts[m], place = pass.slots[m] * strides[1] + start * strides[3];
      for (int64_t h = 0; h < H + G; h++) {
        if (int64_t(model.norms.size()) > first)
          rms_norm(qkv + h * K, model.norms[first + 2 * layer + (h >= H)], qkv + h * K, K, model.eps);
        rotate(qkv + h * K, pass.cos.const_data_ptr<float>() + start * K, pass.sin.const_data_ptr<float>() + start * K, K);
      }
      for (int64_t g = 0; g < G; g++) {
        memcpy(keys + place + g * strides[2], qkv + (H + g) * K, K * sizeof(float));
        memcpy(values + place + g * strides[2], qkv + (H + G + g) * K, K * sizeof(float));
      }
    });
    each(pass.M * H, [&](int64_t i) {
      const int64_t m = i / H, h = i % H, place = pass.slots[m] * strides[1] + h / (H / G) * strides[2];
      const auto head = [&](int64_t size) __attribute__((always_inline)) {
        attend(pass.out + m * pass.qkv_width + h * K, keys + place, values + place, pass.attended + m * width + h * K,
               pass.starts[m] + 1, strides[3], size, scores);
      };
      K == 64 ? head(64) : head(K);  // a constant size is twice as fast
    });
    each(pass.M, [&](int64_t m) { set(pass.heads, pass.attended + m * width, m); });
  }

  void run(float* logits) {
    const int64_t D = pass.D, F = pass.F;
    int64_t rows = pass.M;
    float *x = pass.x, *out = pass.out, *more = nullptr;
    for (int64_t layer = 0; layer < model.layers; layer++) {
      const int64_t first = 7 * layer;
      norm(rows, x, more, model.norms[2 * layer], pass.in);
      multiply(first, 3, pass.in, out);
      attention(layer);
      multiply(first + 3, 1, pass.heads, more = out);
      if (layer == model.layers - 1) {  // only the rows whose logits are asked for go on
        each(rows = pass.N, [&](int64_t n) {
          const int64_t m = pass.keep[n];
          for (int64_t k = 0; k < D; k++) pass.last[n * D + k] = x[m * D + k] + out[m * D + k];
        });
        x = pass.last, more = nullptr;
#pragma omp single
        for (Rows* each : {&pass.in, &pass.gated}) std::visit([&](auto& form) { form.M = rows; }, *each);
      }
      norm(rows, x, more, model.norms[2 * layer + 1], pass.in);
      multiply(first + 4, 2, pass.in, out);
      each(rows, [&](int64_t m) {
        std::fill(row.begin(), row.end(), 0.f);
        swiglu(out + m * 2 * F, row.data(), F);
        set(pass.gated, row.data(), m);
      });
      multiply(first + 6, 1, pass.gated, more = out);
    }
    norm(rows, x, out, model.norms[2 * model.layers], pass.final);
    multiply(7 * model.layers, 1, pass.final, logits);
  }
};

// x (M, D) goes to positions `starts` of `slots` in keys and values (L, S, G, C, K); cos and sin (C, K). Returns the logits of
// the rows `keep`.
Tensor Step::run(const Tensor& x_MD, std::vector<int64_t> slots, std::vector<int64_t> starts, std::vector<int64_t> keep,
                 const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values) {
  Pass pass{*this, slots, starts, keep, cos, sin, keys, values};
  TORCH_CHECK(x_MD.scalar_type() == at::kFloat && keys.scalar_type() == at::kFloat && values.strides() == keys.strides() &&
                  keys.size(4) == pass.K && keys.size(2) == pass.G && keys.stride(4) == 1 && cos.size(0) >= keys.size(3) &&
                  cos.is_contiguous() && sin.is_contiguous(), "float32 caches of this model are needed");
  for (int64_t m = 0; m < pass.M; m++)
    TORCH_CHECK(starts[m] < keys.size(3) && slots[m] < keys.size(1), "row ", to_string(m), " has no such position");
  const int64_t widest = std::max({pass.D, pass.qkv_width, 2 * pass.F});
  const Tensor x = x_MD.clone(), out = at::empty({pass.M, widest}, x.options()), last = at::empty({pass.N, pass.D}, x.options()),
               attended = at::zeros({pass.M, Pass::columns(pass.heads)}, x.options()),
               logits = at::empty({pass.N, matrices.back().O}, x.options());
  pass.x = x.mutable_data_ptr<float>(), pass.out = out.mutable_data_ptr<float>();
  pass.last = last.mutable_data_ptr<float>(), pass.attended = attended.mutable_data_ptr<float>();
#pragma omp parallel num_threads(at::get_num_threads())
  Worker{pass}.run(logits.mutable_data_ptr<float>());
  return logits;
}

TORCH_LIBRARY(mmllm, m) {
  m.def("int8_linear(Tensor x, Tensor panels, Tensor scale, Tensor? bias, int bits) -> Tensor");
  m.def("bf16_linear(Tensor x, Tensor panels, Tensor? bias, int out_features) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor panels, Tensor scale, Tensor? bias, int out_features) -> Tensor");
  m.def("int8_pack(Tensor weight) -> (Tensor, Tensor)");
  m.def("int4_pack(Tensor weight) -> (Tensor, Tensor)");
  m.def("bf16_pack(Tensor weight) -> Tensor");
  m.class_<Step>("Step")
      .def(torch::init<std::vector<Tensor>, std::vector<optional<Tensor>>, std::vector<optional<Tensor>>, std::vector<int64_t>,
                       std::vector<Tensor>, int64_t, int64_t, double>())
      .def("run", &Step::run);
}

TORCH_LIBRARY_IMPL(mmllm, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("bf16_linear", bf16_linear);
  m.impl("int4_linear", int4_linear);
  m.impl("int8_pack", int8_pack);
  m.impl("int4_pack", int4_pack);
  m.impl("bf16_pack", bf16_pack);
}
