// y = x W' + b for packed integer weights, x in floating point. One file, compiled on first use by build.py.
//
// Inputs become fixed point: per row and block of at most 128 columns, x = scale * (l0 + 256 l1 + 65536 l2) with signed
// bytes l ("limbs"). Three limbs hold a float32 to 2^-23 of the block's largest value, two limbs a bfloat16 or float16 to
// 2^-15. Products of unsigned codes with signed bytes are exact integers, so sums do not depend on the number of threads.
//
// Weights lie in tiles of 8 rows. A unit is 32 columns of a tile: eight vectors of 32 bytes, vector q holding columns
// 4q .. 4q+3 of each row, row after row. Several vectors share a byte: see Unit. layout.py writes this order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(AUTO_ROUND_PLAIN)
#define HAS_AVX2 1
#include <immintrin.h>
#endif
#if defined(HAS_AVX2) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_VNNI 1
#define DOT _mm256_dpbusd_epi32
#elif defined(HAS_AVX2) && defined(__AVXVNNI__)
#define HAS_VNNI 1
#define DOT _mm256_dpbusd_avx_epi32
#endif

namespace {

constexpr int ROWS = 8, UNIT = 32, QUADS = 8;
constexpr int AHEAD = 4096;  // bytes; measured on Zen 3, 1024 to 4096 are alike
#define UNROLL _Pragma("GCC unroll 8")

#if defined(HAS_AVX2)
using Bytes = __m256i;  // 32 unsigned codes
using Ints = __m256i;   // one int32 per row
using Floats = __m256;  // one float per row

inline Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <int SHIFT, int MASK>
inline Bytes field(Bytes v) {
  return _mm256_and_si256(_mm256_srli_epi16(v, SHIFT), _mm256_set1_epi8(static_cast<char>(MASK)));
}
template <int AT>
inline Bytes with_bit(Bytes v, Bytes high) {  // v | 4 * bit AT of each byte of high
  Bytes moved = AT >= 2 ? _mm256_srli_epi16(high, AT >= 2 ? AT - 2 : 0) : _mm256_slli_epi16(high, AT < 2 ? 2 - AT : 0);
  return _mm256_or_si256(v, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
}
inline Bytes quad(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}
inline Ints none() { return _mm256_setzero_si256(); }
#if defined(HAS_VNNI)
using Sums = __m256i;  // 32-bit sums of whole bytes
inline Sums add_dot(Sums s, Bytes v, Bytes x) { return DOT(s, v, x); }
template <int WEIGHT>
inline Ints widen(Ints a, Sums s) { return _mm256_add_epi32(a, s); }
#else
using Sums = __m256i;  // 16-bit sums: eight products of at most 2 * 15 * 128 fit
inline Sums add_dot(Sums s, Bytes v, Bytes x) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(v, x)); }
template <int WEIGHT>
inline Ints widen(Ints a, Sums s) { return _mm256_add_epi32(a, _mm256_madd_epi16(s, _mm256_set1_epi16(WEIGHT))); }
#endif
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Ints minus(Ints a, int32_t b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
inline Ints minus_zeros(Ints a, const uint8_t* zeros, int32_t sum) {
  __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
  return _mm256_sub_epi32(a, _mm256_mullo_epi32(z, _mm256_set1_epi32(sum)));
}
inline Floats real(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Floats add_scaled(Floats a, float factor, Floats to) {
  return _mm256_fmadd_ps(a, _mm256_set1_ps(factor), to);
}
inline Floats add_product(Floats a, Floats b, Floats to) { return _mm256_fmadd_ps(a, b, to); }
inline Floats scaled(const uint16_t* scales, float factor) {
  __m256 s = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  return _mm256_mul_ps(s, _mm256_set1_ps(factor));
}
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
#else
struct Bytes { uint8_t b[UNIT]; };
struct Ints { int32_t i[ROWS]; };
struct Floats { float f[ROWS]; };

inline Bytes load(const uint8_t* p) {
  Bytes v;
  std::memcpy(v.b, p, UNIT);
  return v;
}
template <int SHIFT, int MASK>
inline Bytes field(Bytes v) {
  for (auto& b : v.b) b = (b >> SHIFT) & MASK;
  return v;
}
template <int AT>
inline Bytes with_bit(Bytes v, Bytes high) {
  for (int i = 0; i < UNIT; ++i) v.b[i] |= ((high.b[i] >> AT) & 1) << 2;
  return v;
}
inline Ints none() { return Ints{}; }
using Sums = Ints;
inline Sums no_sums() { return Ints{}; }
inline Bytes quad(const int8_t* x) {
  Bytes v;
  for (int r = 0; r < ROWS; ++r) std::memcpy(v.b + 4 * r, x, 4);
  return v;
}
inline Sums add_dot(Sums s, Bytes v, Bytes x) {
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < 4; ++k) s.i[r] += v.b[4 * r + k] * static_cast<int8_t>(x.b[4 * r + k]);
  return s;
}
template <int WEIGHT>
inline Ints widen(Ints a, Sums s) {
  for (int r = 0; r < ROWS; ++r) a.i[r] += WEIGHT * s.i[r];
  return a;
}
inline Ints minus(Ints a, int32_t b) {
  for (auto& i : a.i) i -= b;
  return a;
}
inline Ints minus_zeros(Ints a, const uint8_t* zeros, int32_t sum) {
  for (int r = 0; r < ROWS; ++r) a.i[r] -= zeros[r] * sum;
  return a;
}
inline Floats real(Ints a) {
  Floats f;
  for (int r = 0; r < ROWS; ++r) f.f[r] = static_cast<float>(a.i[r]);
  return f;
}
inline Floats zero_floats() { return Floats{}; }
inline Floats add_scaled(Floats a, float factor, Floats to) {
  for (int r = 0; r < ROWS; ++r) to.f[r] += a.f[r] * factor;
  return to;
}
inline Floats add_product(Floats a, Floats b, Floats to) {
  for (int r = 0; r < ROWS; ++r) to.f[r] += a.f[r] * b.f[r];
  return to;
}
inline Floats scaled(const uint16_t* scales, float factor) {
  Floats s;
  for (int r = 0; r < ROWS; ++r) s.f[r] = static_cast<float>(c10::Half(scales[r], c10::Half::from_bits())) * factor;
  return s;
}
inline void store(float* p, Floats v) { std::memcpy(p, v.f, sizeof(v.f)); }
#endif

// How a unit is stored. `part` unpacks the vectors at `piece`, `per_piece` of them, to a code per byte. 8 bits are two
// planes of 4 where only 16-bit sums exist.
template <int BITS>
struct Unit {
  static constexpr int bytes = UNIT * BITS;
#if defined(HAS_AVX2) && !defined(HAS_VNNI)
  static constexpr int planes = BITS == 8 ? 2 : 1;
#else
  static constexpr int planes = 1;
#endif
  static constexpr int per_piece = BITS == 8 ? 1 : BITS == 4 ? 2 : 4, pieces = QUADS / per_piece;

  template <int PIECE>
  static inline void part(const uint8_t* p, Bytes (*v)[planes]) {
    Bytes w = load(p + UNIT * PIECE);
    if constexpr (BITS == 8) {
      if constexpr (planes == 2) {
        v[0][0] = field<0, 15>(w);
        v[0][1] = field<4, 15>(w);
      } else {
        v[0][0] = w;
      }
    } else if constexpr (BITS == 4) {
      v[0][0] = field<0, 15>(w);
      v[1][0] = field<4, 15>(w);
    } else {
      v[0][0] = field<0, 3>(w);
      v[1][0] = field<2, 3>(w);
      v[2][0] = field<4, 3>(w);
      v[3][0] = field<6, 3>(w);
      if constexpr (BITS == 3) {
        Bytes high = load(p + UNIT * 2);
        v[0][0] = with_bit<4 * PIECE>(v[0][0], high);
        v[1][0] = with_bit<4 * PIECE + 1>(v[1][0], high);
        v[2][0] = with_bit<4 * PIECE + 2>(v[2][0], high);
        v[3][0] = with_bit<4 * PIECE + 3>(v[3][0], high);
      }
    }
  }
};

// The inputs in fixed point. limbs: [m][block][limb][column]; scale: [m][block]; sum of each limb: [m][block][limb].
struct Inputs {
  int64_t blocks, block;
  int count;
  std::vector<int8_t> limbs;
  std::vector<float> scale;
  std::vector<int32_t> sum;

  template <typename T>
  Inputs(const T* x, int64_t m, int64_t columns, int64_t padded, int64_t block_, int count_)
      : blocks(padded / block_), block(block_), count(count_) {
    limbs.resize(m * padded * count);
    scale.resize(m * blocks);
    sum.resize(m * blocks * count);
    at::parallel_for(0, m, m > 8 ? 4 : m, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        for (int64_t b = 0; b < blocks; ++b) fill(x + row * columns + b * block, std::min(block, columns - b * block), row * blocks + b);
    });
  }

  template <typename T>
  void fill(const T* x, int64_t n, int64_t at) {
    alignas(32) float v[128];
    alignas(32) int32_t whole[128];
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < block; ++i) v[i] = i < n ? static_cast<float>(x[i]) : 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < block; ++i) largest = std::max(largest, std::fabs(v[i]));
    for (int64_t i = 0; i < block; ++i) finite &= std::fabs(v[i]) <= 3.0e38f;
    // All limbs at 127 would be 127, 32639, 8355711; the last with room for the rounding of v * inverse.
    const float top = count == 1 ? 127.0f : count == 2 ? 32639.0f : 8355584.0f;
    const float inverse = finite && largest > 0 ? top / largest : 0;
    const bool usable = inverse > 0 && inverse <= 3.0e38f;
    scale[at] = finite ? (usable ? largest / top : 0) : NAN;
    int8_t* out = limbs.data() + at * count * block;
    for (int64_t i = 0; i < block; ++i) whole[i] = usable ? static_cast<int32_t>(std::rint(v[i] * inverse)) : 0;
    for (int l = 0; l < count; ++l) {
      int32_t total = 0;
      for (int64_t i = 0; i < block; ++i) {
        const auto limb = static_cast<int8_t>(whole[i]);
        out[l * block + i] = limb;
        total += limb;
        whole[i] = (whole[i] - limb) >> 8;
      }
      sum[at * count + l] = total;
    }
  }
};

struct Weights {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: the middle code
  int64_t tiles, units, groups, group;
};

// One piece of T tiles against M rows of inputs: each broadcast input serves all tiles, each unpacked code all rows.
template <int BITS, int LIMBS, int M, int T, int PIECE>
inline void multiply_piece(const uint8_t* const (&codes)[T], const int8_t* x, int64_t per_row, int64_t block,
                           Sums (&s)[T][M][LIMBS][Unit<BITS>::planes]) {
  using U = Unit<BITS>;
  Bytes v[T][U::per_piece][U::planes];
  UNROLL for (int t = 0; t < T; ++t) U::template part<PIECE>(codes[t], v[t]);
  UNROLL for (int r = 0; r < M; ++r)
    UNROLL for (int l = 0; l < LIMBS; ++l)
      UNROLL for (int i = 0; i < U::per_piece; ++i) {
        const Bytes four = quad(x + r * per_row + l * block + 4 * (PIECE * U::per_piece + i));
        UNROLL for (int t = 0; t < T; ++t)
          UNROLL for (int p = 0; p < U::planes; ++p) s[t][r][l][p] = add_dot(s[t][r][l][p], v[t][i][p], four);
      }
  if constexpr (PIECE + 1 < U::pieces) multiply_piece<BITS, LIMBS, M, T, PIECE + 1>(codes, x, per_row, block, s);
}

// Rows m .. m + M of the product with T neighbouring tiles: out[tile][row].
template <int BITS, int LIMBS, int M, int T>
__attribute__((noinline)) void multiply(const Weights& w, const Inputs& in, int64_t tile, int64_t m,
                                        float (*out)[M][ROWS]) {
  using U = Unit<BITS>;
  Floats total[T][M];
  UNROLL for (int t = 0; t < T; ++t)
    UNROLL for (int r = 0; r < M; ++r) total[t][r] = zero_floats();
  const int64_t per_tile = w.units * U::bytes, per_group = w.groups * ROWS;
  const uint8_t* codes[T];
  UNROLL for (int t = 0; t < T; ++t) codes[t] = w.codes + (tile + t) * per_tile;
  const uint16_t* scales = w.scales + tile * per_group;
  const uint8_t* zeros = w.zeros ? w.zeros + tile * per_group : nullptr;
  const int64_t block = in.block, per_row = in.blocks * LIMBS * block;
  const int8_t* limbs = in.limbs.data() + m * per_row;
  int64_t left = w.group;  // columns until the next group
  for (int64_t b = 0; b < in.blocks; ++b, limbs += LIMBS * block) {
    Ints a[T][M][LIMBS];
    UNROLL for (int t = 0; t < T; ++t)
      UNROLL for (int r = 0; r < M; ++r)
        UNROLL for (int l = 0; l < LIMBS; ++l) a[t][r][l] = none();
    for (int64_t column = 0; column < block; column += UNIT) {
      Sums s[T][M][LIMBS][U::planes];
      UNROLL for (int t = 0; t < T; ++t) {
        UNROLL for (int r = 0; r < M; ++r)
          UNROLL for (int l = 0; l < LIMBS; ++l)
            UNROLL for (int p = 0; p < U::planes; ++p) s[t][r][l][p] = no_sums();
        // Tiles lie one after the other, so this also fetches the beginning of the next ones.
        UNROLL for (int line = 0; line < U::bytes; line += 64) __builtin_prefetch(codes[t] + AHEAD + line);
      }
      multiply_piece<BITS, LIMBS, M, T, 0>(codes, limbs + column, per_row, block, s);
      UNROLL for (int t = 0; t < T; ++t) {
        codes[t] += U::bytes;
        UNROLL for (int r = 0; r < M; ++r)
          UNROLL for (int l = 0; l < LIMBS; ++l) {
            a[t][r][l] = widen<1>(a[t][r][l], s[t][r][l][0]);
            if constexpr (U::planes == 2) a[t][r][l] = widen<16>(a[t][r][l], s[t][r][l][1]);
          }
      }
    }
    UNROLL for (int t = 0; t < T; ++t)
      UNROLL for (int r = 0; r < M; ++r) {
        const int64_t at = (m + r) * in.blocks + b;
        Floats value = zero_floats();
        UNROLL for (int l = 0; l < LIMBS; ++l) {
          const int32_t sum = in.sum[at * LIMBS + l];
          const Ints shifted = zeros ? minus_zeros(a[t][r][l], zeros + t * per_group, sum)
                                     : minus(a[t][r][l], sum * (1 << (BITS - 1)));
          value = add_scaled(real(shifted), l == 0 ? 1.0f : l == 1 ? 256.0f : 65536.0f, value);
        }
        total[t][r] = add_product(value, scaled(scales + t * per_group, in.scale[at]), total[t][r]);
      }
    left -= block;
    if (left == 0) {
      left = w.group;
      scales += ROWS;
      if (zeros) zeros += ROWS;
    }
  }
  UNROLL for (int t = 0; t < T; ++t)
    UNROLL for (int r = 0; r < M; ++r) store(out[t][r], total[t][r]);
}

template <int BITS, int LIMBS, int M, int T, typename Y>
inline void multiply_into(const Weights& w, const Inputs& in, int64_t tile, int64_t m, const float* bias, Y* y,
                          int64_t rows) {
  float out[T][M][ROWS];
  multiply<BITS, LIMBS, M, T>(w, in, tile, m, out);
  for (int t = 0; t < T; ++t) {
    const int64_t first = (tile + t) * ROWS, count = std::min<int64_t>(ROWS, rows - first);
    for (int r = 0; r < M; ++r)
      for (int64_t i = 0; i < count; ++i)
        y[(m + r) * rows + first + i] = static_cast<Y>(bias ? out[t][r][i] + bias[first + i] : out[t][r][i]);
  }
}

template <int BITS, int LIMBS, typename Y>
void run(const Weights& w, const Inputs& in, int64_t m, const float* bias, Y* y, int64_t rows) {
  // As many sums as the sixteen registers hold next to codes and inputs.
  constexpr int AT_ONCE = LIMBS * Unit<BITS>::planes > 2 ? 2 : 4, TILES = LIMBS * Unit<BITS>::planes > 4 ? 1 : 2;
  constexpr int64_t NEAR = 64;  // rows of x that stay in the second-level cache while all tiles pass by
  const int64_t work = w.units * UNIT * ROWS * m;  // products per tile
  const int64_t grain = std::max<int64_t>(TILES, (1 << 17) / std::max<int64_t>(1, work));
  at::parallel_for(0, w.tiles, grain, [&](int64_t from, int64_t to) {
    for (int64_t start = 0; start < m; start += NEAR) {
      const int64_t stop = std::min(m, start + NEAR);
      for (int64_t tile = from; tile < to; tile += TILES) {
        const bool whole = tile + TILES <= to;
        int64_t at = start;
        for (; at + AT_ONCE <= stop; at += AT_ONCE)
          for (int64_t t = tile; t < std::min<int64_t>(tile + TILES, to); ++t)
            multiply_into<BITS, LIMBS, AT_ONCE, 1>(w, in, t, at, bias, y, rows);
        for (; at < stop; ++at)
          if (whole) multiply_into<BITS, LIMBS, 1, TILES>(w, in, tile, at, bias, y, rows);
          else multiply_into<BITS, LIMBS, 1, 1>(w, in, tile, at, bias, y, rows);
      }
    }
  });
}

template <typename T>
void for_type(const Weights& w, const at::Tensor& x, int64_t columns, int64_t block, int64_t bits, int64_t limbs,
              const float* bias, at::Tensor& y) {
  const int64_t m = x.size(0), rows = y.size(1);
  const Inputs in(x.const_data_ptr<T>(), m, columns, w.units * UNIT, block, static_cast<int>(limbs));
  T* out = y.mutable_data_ptr<T>();
#define CASE(B, L) \
  if (bits == B && limbs == L) return run<B, L, T>(w, in, m, bias, out, rows);
  CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(3, 1) CASE(3, 2) CASE(3, 3)
  CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(8, 1) CASE(8, 2) CASE(8, 3)
#undef CASE
  TORCH_CHECK(false, "auto_round cpu kernels: ", bits, " bits with ", limbs, " limbs do not exist");
}

// x: (M, I). codes: (tiles, units, bytes) uint8. scales, zeros: (tiles, groups, 8) float16, uint8. Gives (M, rows).
at::Tensor linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                  const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias, int64_t bits,
                  int64_t group, int64_t rows, int64_t limbs) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be contiguous (M, I)");
  TORCH_CHECK(codes.is_contiguous() && codes.size(2) == UNIT * bits, "codes must be (tiles, units, ", UNIT * bits, ")");
  TORCH_CHECK(group % UNIT == 0 && x.size(1) <= codes.size(1) * UNIT && rows <= codes.size(0) * ROWS,
              "x, codes, rows and group do not fit together");
  TORCH_CHECK(scales.scalar_type() == at::kHalf && scales.is_contiguous() && scales.size(0) == codes.size(0) &&
                  scales.size(1) * group >= codes.size(1) * UNIT, "scales must be (tiles, groups, 8) float16");
  TORCH_CHECK(!zeros || (zeros->scalar_type() == at::kByte && zeros->is_contiguous() && zeros->sizes() == scales.sizes()),
              "zeros must be uint8 of the shape of scales");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == rows),
              "bias must be float32 (rows)");
  at::Tensor y = at::empty({x.size(0), rows}, x.options());
  if (x.size(0) == 0) return y;
  const Weights w{codes.const_data_ptr<uint8_t>(),
                  reinterpret_cast<const uint16_t*>(scales.const_data_ptr<at::Half>()),
                  zeros ? zeros->const_data_ptr<uint8_t>() : nullptr,
                  codes.size(0), codes.size(1), scales.size(1), group};
  const int64_t padded = w.units * UNIT;
  int64_t block = UNIT;
  for (int64_t wider : {128, 64})
    if (group % wider == 0 && padded % wider == 0) {
      block = wider;
      break;
    }
  if (limbs == 1) block = UNIT;  // eight bits need near neighbours to share a scale
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) for_type<float>(w, x, x.size(1), block, bits, limbs, b, y);
  else if (x.scalar_type() == at::kBFloat16) for_type<at::BFloat16>(w, x, x.size(1), block, bits, limbs, b, y);
  else if (x.scalar_type() == at::kHalf) for_type<at::Half>(w, x, x.size(1), block, bits, limbs, b, y);
  else TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  return y;
}

std::string instructions() {
#if defined(HAS_VNNI)
  return "VNNI";
#elif defined(HAS_AVX2)
  return "AVX2";
#else
  return "plain C++";
#endif
}

}  // namespace

TORCH_LIBRARY(AUTO_ROUND_LIBRARY, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group, int rows, int limbs) -> Tensor");
  m.impl("linear", c10::DispatchKey::CPU, &linear);
  m.def("instructions() -> str", &instructions);
}
