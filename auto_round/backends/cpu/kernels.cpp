// y = x W' + b for packed integer weights, x in floating point. Compiled on first use by build.py.
//
// Inputs become fixed point: per row and block of at most 128 columns, x = scale * (l0 + 256 l1 + 65536 l2) with signed
// bytes l ("limbs"). Three limbs hold a float32 to 2^-23 of the block's largest value, two limbs a bfloat16 or float16 to
// 2^-15. Products of unsigned codes with signed bytes are exact integers, so sums do not depend on the number of threads.
//
// Weights lie in tiles of 8 rows. A unit is 32 columns of a tile: eight vectors of 32 bytes, vector q holding columns
// 4q .. 4q+3 of each row, row after row. Several vectors share a byte: see Unit. layout.py writes this order.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t FEWEST = 8, FEWEST_REAL = 32;  // rows of x from which the matrix unit is used, in either way of amx.h
constexpr int AHEAD = 4096;  // bytes; measured on Zen 3, 1024 to 4096 are alike
constexpr int64_t PIECE_OF_WEIGHT = 1 << 19;  // float32 weights at a time: 2 MB; 128 K to 1 M were nearly alike on Zen 3
// Rows of x from which float32 products of MKL are faster than integer ones with 1 to 3 limbs: measured on a Xeon without
// AMX and on Zen 3; with AVX-VNNI alone, 16 registers of 256 bits, the latter holds too.
#if defined(HAS_AVX512)
constexpr int64_t MANY[] = {INT64_MAX, INT64_MAX, INT64_MAX, 384};
constexpr bool SIDE_BY_SIDE = true;  // 32 registers hold the sums of several rows of x with two tiles
#else
constexpr int64_t MANY[] = {INT64_MAX, INT64_MAX, 256, 32};
constexpr bool SIDE_BY_SIDE = false;
#endif

// The inputs in fixed point, in parts of `height` rows; what the last part lacks is zero.
// limbs: [part][block][limb][row][column]; scale: [part][block][row]; sums: [part][block][row][1 or 2], of the first two
// limbs together (l0 + 256 l1) and of the third.
struct Inputs {
  int64_t blocks, block, height;
  int count;
  std::vector<int8_t> limbs;
  std::vector<float> scale;
  std::vector<int32_t> sums;

  template <typename T>
  Inputs(const T* x, int64_t m, int64_t columns, int64_t padded, int64_t block_, int64_t height_, int count_)
      : blocks(padded / block_), block(block_), height(height_), count(count_) {
    const int64_t parts = (m + height - 1) / height;
    limbs.resize(parts * height * padded * count);
    scale.resize(parts * height * blocks);
    sums.resize(scale.size() * (count > 2 ? 2 : 1));
    at::parallel_for(0, m, m > 8 ? 4 : m, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        for (int64_t b = 0; b < blocks; ++b)
          fill(x + row * columns + b * block, std::min(block, columns - b * block),
               (row / height * blocks + b) * height, row % height);
    });
  }

  template <typename T>
  void fill(const T* x, int64_t n, int64_t first, int64_t row) {
    const int64_t size = block;  // a copy: the compiler must not fear that writing limbs changes it
    alignas(64) float v[128];
    alignas(64) int32_t whole[128], limb[128];
    for (int64_t i = 0; i < size; ++i) v[i] = i < n ? static_cast<float>(x[i]) : 0.0f;
    int32_t bits[128], largest_bits = 0;  // without their signs, floats are in the order of their bits, NaN last
    std::memcpy(bits, v, sizeof(float) * size);
    for (int64_t i = 0; i < size; ++i) largest_bits = std::max(largest_bits, bits[i] & INT32_MAX);
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof(largest));
    const bool finite = largest <= 3.0e38f;
    // All limbs at 127 would be 127, 32639, 8355711; the last with room for the rounding of v * inverse.
    const float top = count == 1 ? 127.0f : count == 2 ? 32639.0f : 8355584.0f;
    const float inverse = finite && largest > 0 ? top / largest : 0;
    const bool usable = inverse > 0 && inverse <= 3.0e38f;
    scale[first + row] = finite ? (usable ? largest / top : 0) : NAN;
    if (usable)
      for (int64_t i = 0; i < size; ++i) whole[i] = static_cast<int32_t>(std::rint(v[i] * inverse));
    else
      std::fill_n(whole, size, 0);
    int32_t total[3] = {};
    for (int l = 0; l < count; ++l) {
      int8_t* out = limbs.data() + (first * count + l * height + row) * size;
      int32_t sum = 0;
      for (int64_t i = 0; i < size; ++i) {
        limb[i] = static_cast<int8_t>(whole[i]);
        sum += limb[i];
        whole[i] = (whole[i] - limb[i]) >> 8;
      }
      for (int64_t i = 0; i < size; ++i) out[i] = static_cast<int8_t>(limb[i]);
      total[l] = sum;
    }
    if (count > 2) sums[2 * (first + row) + 1] = total[2];
    sums[(count > 2 ? 2 : 1) * (first + row)] = total[0] + 256 * total[1];
  }
};

struct Weights {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: the middle code
  int64_t tiles, units, groups, group;
};

template <int LIMBS>
constexpr int SUMS = LIMBS > 2 ? 2 : 1;

// Sums of codes times limbs, less zeros times the sums of the limbs. Two limbs fit an integer: 128 * 255 * 32639 < 2^31.
template <int BITS, int LIMBS>
inline Floats whole(const Ints (&a)[LIMBS], const uint8_t* zeros, const int32_t* sums) {
  const auto less_zeros = [&](Ints v, int32_t sum) {
    return zeros ? minus_zeros(v, zeros, sum) : minus(v, sum * (1 << (BITS - 1)));
  };
  Ints low = a[0];
  if constexpr (LIMBS > 1) low = add_bytes(low, a[1]);
  Floats value = real(less_zeros(low, sums[0]));
  if constexpr (LIMBS > 2) value = add_scaled(real(less_zeros(a[2], sums[1])), 65536.0f, value);
  return value;
}

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
  const int64_t block = in.block, per_row = in.blocks * LIMBS * block;  // rows are parts of their own
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
        const Floats value = whole<BITS, LIMBS>(a[t][r], zeros ? zeros + t * per_group : nullptr, &in.sums[at * SUMS<LIMBS>]);
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

// Results of one tile and row of x, rounded to the dtype of y.
template <typename Y>
inline void put(const float* sums, const float* bias, Y* y, int64_t count) {
  if (count == ROWS) return put_all(sums, bias, y);
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<Y>(bias ? sums[i] + bias[i] : sums[i]);
}

template <int BITS, int LIMBS, int M, int T, typename Y>
inline void multiply_into(const Weights& w, const Inputs& in, int64_t tile, int64_t m, const float* bias, Y* y,
                          int64_t rows) {
  float out[T][M][ROWS];
  multiply<BITS, LIMBS, M, T>(w, in, tile, m, out);
  for (int t = 0; t < T; ++t) {
    const int64_t first = (tile + t) * ROWS, count = std::min<int64_t>(ROWS, rows - first);
    for (int r = 0; r < M; ++r) put(out[t][r], bias ? bias + first : nullptr, y + (m + r) * rows + first, count);
  }
}

// The codes of a unit, one to a byte, vector after vector.
template <int BITS, int PIECE = 0>
inline void unpack(const uint8_t* p, uint8_t* out) {
  using U = Unit<BITS>;
  if constexpr (BITS == 8) {
    std::memcpy(out, p, U::bytes);
  } else {
    Bytes v[U::per_piece][U::planes];
    U::template part<PIECE>(p, v);
    UNROLL for (int i = 0; i < U::per_piece; ++i) spill(out + VECTOR * (PIECE * U::per_piece + i), v[i][0]);
    if constexpr (PIECE + 1 < U::pieces) unpack<BITS, PIECE + 1>(p, out);
  }
}

}  // namespace

#include "amx.h"

namespace {

// One weight to multiply with, and where its results go.
template <typename Y>
struct Job {
  Weights w;
  const float* bias;
  Y* y;
  int64_t rows;
};

template <int BITS, int LIMBS, typename Y>
void few_rows(const Job<Y>& job, const Inputs& in, int64_t m, int64_t from, int64_t to) {
  // As many sums as the sixteen registers hold next to codes and inputs.
  constexpr int AT_ONCE = LIMBS * Unit<BITS>::planes > 2 ? 2 : 4, TILES = LIMBS * Unit<BITS>::planes > 4 ? 1 : 2;
  constexpr int64_t NEAR = 64;  // rows of x that stay in the second-level cache while all tiles pass by
  const auto& [w, bias, y, rows] = job;
  for (int64_t start = 0; start < m; start += NEAR) {
    const int64_t stop = std::min(m, start + NEAR);
    for (int64_t tile = from; tile < to; tile += TILES) {
      const bool whole = tile + TILES <= to;
      int64_t at = start;
      if constexpr (SIDE_BY_SIDE)
        for (; whole && at + AT_ONCE <= stop; at += AT_ONCE)
          multiply_into<BITS, LIMBS, AT_ONCE, TILES>(w, in, tile, at, bias, y, rows);
      for (; at + AT_ONCE <= stop; at += AT_ONCE)
        for (int64_t t = tile; t < std::min<int64_t>(tile + TILES, to); ++t)
          multiply_into<BITS, LIMBS, AT_ONCE, 1>(w, in, t, at, bias, y, rows);
      for (; at < stop; ++at)
        if (whole) multiply_into<BITS, LIMBS, 1, TILES>(w, in, tile, at, bias, y, rows);
        else multiply_into<BITS, LIMBS, 1, 1>(w, in, tile, at, bias, y, rows);
    }
  }
}

// The tiles of all jobs in a row, shared out among the threads.
template <int BITS, int LIMBS, typename Y>
void run(const std::vector<Job<Y>>& jobs, const Inputs& in, int64_t m) {
  int64_t tiles = 0;
  for (const auto& job : jobs) tiles += job.w.tiles;
  const int64_t work = jobs[0].w.units * UNIT * ROWS * m;  // products per tile
  const int64_t grain = std::max<int64_t>(2, (1 << 17) / std::max<int64_t>(1, work));
  at::parallel_for(0, tiles, grain, [&](int64_t from, int64_t to) {
    for (const auto& job : jobs) {
      const int64_t first = std::max<int64_t>(0, from), last = std::min(to, job.w.tiles);
      if (first < last) {
#if defined(HAS_AMX)
        if (in.height > 1) Pairs<BITS, LIMBS, Y>(job.w, in, job.bias, job.y, m, job.rows).multiply(first, last);
        else
#endif
          few_rows<BITS, LIMBS>(job, in, m, first, last);
      }
      from -= job.w.tiles;
      to -= job.w.tiles;
    }
  });
}

// Whether `m` rows go to the matrix unit.
bool by_amx([[maybe_unused]] int64_t m) {
#if defined(HAS_AMX)
  return m >= FEWEST && may_use_amx();
#else
  return false;
#endif
}

// Whether x goes there as it is. Rounding it to 8 bits would only make it slower.
bool by_amx_as_real([[maybe_unused]] const at::Tensor& x, [[maybe_unused]] int64_t limbs) {
#if defined(HAS_AMX)
  return x.scalar_type() == at::kBFloat16 && limbs <= 2 && x.size(0) >= FEWEST_REAL && may_use_amx();
#else
  return false;
#endif
}

#if defined(HAS_AMX)
void multiply_real(const Weights& w, const at::Tensor& x, int64_t block, int64_t bits, const float* bias, const at::Tensor& y) {
  const Halves in(x.const_data_ptr<at::BFloat16>(), x.size(0), x.size(1), w.units * UNIT);
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, w.tiles, 2, [&](int64_t from, int64_t to) {
#define CASE(B) \
  if (bits == B) RealPairs<B>(w, in, block, bias, out, x.size(0), y.size(1)).multiply(from, to);
    CASE(2) CASE(3) CASE(4) CASE(8)
#undef CASE
  });
}
#endif

template <typename T>
void for_type(const std::vector<Weights>& all, const at::Tensor& x, int64_t block, int64_t bits, int64_t limbs,
              const std::vector<const float*>& bias, const std::vector<at::Tensor>& y) {
  const int64_t m = x.size(0);
#if defined(HAS_AMX)
  if (by_amx_as_real(x, limbs)) {
    for (size_t i = 0; i < all.size(); ++i) multiply_real(all[i], x, block, bits, bias[i], y[i]);
    return;
  }
#endif
  const int64_t parts = by_amx(m) ? (m + 15) / 16 : m;
  const Inputs in(x.const_data_ptr<T>(), m, x.size(1), all[0].units * UNIT, block, m ? (m + parts - 1) / parts : 1,
                  static_cast<int>(limbs));
  std::vector<Job<T>> jobs;
  for (size_t i = 0; i < all.size(); ++i) jobs.push_back({all[i], bias[i], y[i].mutable_data_ptr<T>(), y[i].size(1)});
#define CASE(B, L) \
  if (bits == B && limbs == L) return run<B, L, T>(jobs, in, m);
  CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(3, 1) CASE(3, 2) CASE(3, 3)
  CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(8, 1) CASE(8, 2) CASE(8, 3)
#undef CASE
  TORCH_CHECK(false, "auto_round cpu kernels: ", bits, " bits with ", limbs, " limbs do not exist");
}

// Tiles first .. last as (code - zero) * scale: out[row][padded columns].
template <int BITS>
void dequantize(const Weights& w, int64_t first, int64_t last, float* out) {
  const int64_t columns = w.units * UNIT;
  at::parallel_for(first, last, std::max<int64_t>(1, (1 << 15) / (columns * ROWS)), [&](int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile)
      for (int64_t u = 0; u < w.units; ++u) {
        alignas(64) uint8_t codes[QUADS * VECTOR];
        unpack<BITS>(w.codes + (tile * w.units + u) * Unit<BITS>::bytes, codes);
        const int64_t at = (tile * w.groups + u * UNIT / w.group) * ROWS;
        float scale[ROWS];
        store(scale, scaled(w.scales + at, 1.0f));
        for (int r = 0; r < ROWS; ++r) {
          const float zero = w.zeros ? w.zeros[at + r] : 1 << (BITS - 1);
          float* row = out + ((tile - first) * ROWS + r) * columns + u * UNIT;
          for (int q = 0; q < QUADS; q += 2) {
            uint8_t eight[8];  // columns 4q .. 4q+7 of row r: one vector of floats
            std::memcpy(eight, codes + q * VECTOR + 4 * r, 4);
            std::memcpy(eight + 4, codes + (q + 1) * VECTOR + 4 * r, 4);
            UNROLL for (int k = 0; k < 8; ++k) row[4 * q + k] = (static_cast<float>(eight[k]) - zero) * scale[r];
          }
        }
      }
  });
}

// Calls `run.operator()<bits>()`.
template <typename F>
void by_bits(int64_t bits, const F& run) {
  TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, got ", bits);
  if (bits == 2) run.template operator()<2>();
  else if (bits == 3) run.template operator()<3>();
  else if (bits == 4) run.template operator()<4>();
  else run.template operator()<8>();
}

void dequantize(const Weights& w, int64_t bits, int64_t first, int64_t last, float* out) {
  by_bits(bits, [&]<int BITS>() { dequantize<BITS>(w, first, last, out); });
}

// Many rows of x: some tiles at a time become float32, which torch's matrix library multiplies. See MANY.
void multiply_many(const Weights& w, int64_t bits, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                   const at::Tensor& y) {
  const at::Tensor wide = x.to(at::kFloat);
  const int64_t rows = y.size(1), columns = w.units * UNIT;
  const int64_t some = std::min(w.tiles, std::max<int64_t>(8, PIECE_OF_WEIGHT / (columns * ROWS)));
  const at::Tensor piece = at::empty({some * ROWS, columns}, at::kFloat);
  for (int64_t tile = 0; tile * ROWS < rows; tile += some) {
    const int64_t from = tile * ROWS, count = std::min(some * ROWS, rows - from);
    dequantize(w, bits, tile, std::min(w.tiles, tile + some), piece.mutable_data_ptr<float>());
    const at::Tensor part = piece.narrow(0, 0, count).narrow(1, 0, x.size(1)).t();
    y.narrow(1, from, count).copy_(bias ? at::addmm(bias->narrow(0, from, count), wide, part) : at::mm(wide, part));
  }
}

// codes: (tiles, units, bytes) uint8. scales, zeros: (tiles, groups, 8) float16, uint8.
Weights weights(const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& zeros, int64_t bits,
                int64_t group, int64_t rows, int64_t columns) {
  TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, got ", bits);
  TORCH_CHECK(codes.is_contiguous() && codes.size(2) == VECTOR * bits, "codes must be (tiles, units, ", VECTOR * bits, ")");
  TORCH_CHECK(group % UNIT == 0 && columns <= codes.size(1) * UNIT && rows <= codes.size(0) * ROWS,
              "x, codes, rows and group do not fit together");
  TORCH_CHECK(scales.scalar_type() == at::kHalf && scales.is_contiguous() && scales.size(0) == codes.size(0) &&
                  scales.size(2) == ROWS &&
                  scales.size(1) * group >= codes.size(1) * UNIT, "scales must be (tiles, groups, ", ROWS, ") float16");
  TORCH_CHECK(!zeros || (zeros->scalar_type() == at::kByte && zeros->is_contiguous() && zeros->sizes() == scales.sizes()),
              "zeros must be uint8 of the shape of scales");
  return {codes.const_data_ptr<uint8_t>(),
          reinterpret_cast<const uint16_t*>(scales.const_data_ptr<at::Half>()),
          zeros ? zeros->const_data_ptr<uint8_t>() : nullptr,
          codes.size(0), codes.size(1), scales.size(1), group};
}

// x: (M, I). Gives (M, rows) for every weight of one setting: the inputs are prepared once, the threads woken once.
std::vector<at::Tensor> linear_many(const at::Tensor& x, at::TensorList codes, at::TensorList scales,
                                    const c10::List<std::optional<at::Tensor>>& zeros,
                                    const c10::List<std::optional<at::Tensor>>& bias, int64_t bits, int64_t group,
                                    at::IntArrayRef rows, int64_t limbs) {
  const size_t count = codes.size();
  TORCH_CHECK(count && scales.size() == count && zeros.size() == count && bias.size() == count && rows.size() == count,
              "codes, scales, zeros, bias and rows must be as many, and some");
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be contiguous (M, I)");
  TORCH_CHECK(limbs >= 1 && limbs <= 3, "there are 1 to 3 limbs, got ", limbs);
  std::vector<Weights> all;
  std::vector<const float*> b;
  std::vector<at::Tensor> y;
  for (size_t i = 0; i < count; ++i) {
    const std::optional<at::Tensor> zero = zeros[i], added = bias[i];
    all.push_back(weights(codes[i], scales[i], zero, bits, group, rows[i], x.size(1)));
    TORCH_CHECK(all[i].units == all[0].units, "all weights must have the same columns");
    TORCH_CHECK(!added || (added->scalar_type() == at::kFloat && added->is_contiguous() && added->numel() == rows[i]),
                "bias must be float32 (rows)");
    b.push_back(added ? added->const_data_ptr<float>() : nullptr);
    y.push_back(at::empty({x.size(0), rows[i]}, x.options()));
  }
  if (x.size(0) == 0) return y;
  if (x.size(0) >= MANY[limbs] && !by_amx(x.size(0))) {
    for (size_t i = 0; i < count; ++i) multiply_many(all[i], bits, x, bias.get(i), y[i]);
    return y;
  }
  const int64_t padded = all[0].units * UNIT;
  int64_t block = UNIT;
  for (int64_t wider : {128, 64})
    if (group % wider == 0 && padded % wider == 0) {
      block = wider;
      break;
    }
  if (limbs == 1 && !by_amx_as_real(x, limbs)) block = UNIT;  // eight bits need near neighbours to share a scale
  if (x.scalar_type() == at::kFloat) for_type<float>(all, x, block, bits, limbs, b, y);
  else if (x.scalar_type() == at::kBFloat16) for_type<at::BFloat16>(all, x, block, bits, limbs, b, y);
  else if (x.scalar_type() == at::kHalf) for_type<at::Half>(all, x, block, bits, limbs, b, y);
  else TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  return y;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                  const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias, int64_t bits,
                  int64_t group, int64_t rows, int64_t limbs) {
  return linear_many(x, {codes}, {scales}, c10::List<std::optional<at::Tensor>>({zeros}),
                     c10::List<std::optional<at::Tensor>>({bias}), bits, group, {rows}, limbs)[0];
}

// The whole weight: (rows, columns) float32.
at::Tensor weight(const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                  int64_t bits, int64_t group, int64_t rows, int64_t columns) {
  const Weights w = weights(codes, scales, zeros, bits, group, rows, columns);
  const at::Tensor out = at::empty({w.tiles * ROWS, w.units * UNIT}, at::kFloat);
  dequantize(w, bits, 0, w.tiles, out.mutable_data_ptr<float>());
  return out.narrow(0, 0, rows).narrow(1, 0, columns);
}

// Four codes, the lowest bits of x, to a byte each.
template <int BITS>
inline uint32_t spread(uint32_t x) {
  if constexpr (BITS == 4) {
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
  } else if constexpr (BITS == 3) {
    return (x & 7) | (x & 0x38) << 5 | (x & 0x1c0) << 10 | (x & 0xe00) << 15;
  } else {
    x = (x | x << 12) & 0x000f000fu;
    return (x | x << 6) & 0x03030303u;
  }
}

// A unit from the words of its rows, BITS of them per row: 32 codes as one stream of bits. The order of layout.py means
// that vector q has the codes 4q .. 4q+3 of each row in a lane of 32 bits, so every lane is a matter of its own.
template <int BITS>
void unit_of_words(const uint32_t (&words)[BITS][ROWS], uint8_t* out) {
  uint32_t unit[BITS][ROWS];
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (BITS == 8) {
      UNROLL for (int q = 0; q < QUADS; ++q) unit[q][r] = words[q][r];
    } else if constexpr (BITS == 4) {
      UNROLL for (int j = 0; j < 4; ++j) unit[j][r] = spread<4>(words[j][r] & 0xffff) | spread<4>(words[j][r] >> 16) << 4;
    } else if constexpr (BITS == 2) {
      UNROLL for (int j = 0; j < 2; ++j) {
        unit[j][r] = 0;
        UNROLL for (int k = 0; k < 4; ++k) unit[j][r] |= spread<2>(words[j][r] >> 8 * k & 0xff) << 2 * k;
      }
    } else {
      const uint64_t low = words[0][r] | uint64_t{words[1][r]} << 32, high = words[1][r] | uint64_t{words[2][r]} << 32;
      unit[0][r] = unit[1][r] = unit[2][r] = 0;
      UNROLL for (int q = 0; q < QUADS; ++q) {
        const uint32_t four = spread<3>(static_cast<uint32_t>(q < 4 ? low >> 12 * q : high >> (12 * q - 32)) & 0xfff);
        unit[q / 4][r] |= (four & 0x03030303u) << 2 * (q % 4);
        unit[2][r] |= (four >> 2 & 0x01010101u) << q;
      }
    }
  }
  std::memcpy(out, unit, sizeof(unit));
}

// GPTQ's words, (ceil(I * bits / 32), O) int32, each row a stream of bits downwards, to (tiles, units, bytes) in the order
// that the kernels read; what is missing becomes 0.
at::Tensor tile(const at::Tensor& words, int64_t bits) {
  TORCH_CHECK(words.dim() == 2 && words.scalar_type() == at::kInt && words.is_contiguous(), "words must be (W, O) int32");
  constexpr int64_t NEAR = 16;  // tiles at a time: 1 KB of each line of words
  const int64_t lines = words.size(0), rows = words.size(1);
  const int64_t tiles = (rows + ROWS - 1) / ROWS, units = (lines + bits - 1) / std::max<int64_t>(1, bits);
  const at::Tensor out = at::empty({tiles, units, VECTOR * bits}, words.options().dtype(at::kByte));
  const auto* from = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  by_bits(bits, [&]<int BITS>() {
    at::parallel_for(0, (tiles + NEAR - 1) / NEAR, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        for (int64_t u = 0; u < units; ++u)
          for (int64_t t = part * NEAR; t < std::min(tiles, (part + 1) * NEAR); ++t) {
            uint32_t lanes[BITS][ROWS] = {};
            const int64_t count = std::min<int64_t>(ROWS, rows - t * ROWS);
            for (int64_t w = 0; w < std::min<int64_t>(BITS, lines - u * BITS); ++w)
              std::memcpy(lanes[w], from + (u * BITS + w) * rows + t * ROWS, sizeof(uint32_t) * count);
            unit_of_words<BITS>(lanes, to + (t * units + u) * VECTOR * BITS);
          }
    });
  });
  return out;
}

std::string instructions() {
#if defined(HAS_AMX)
  if (may_use_amx()) return "AMX and AVX-512 VNNI";
#endif
#if defined(HAS_AVX512)
  return "AVX-512 VNNI";
#elif defined(HAS_VNNI)
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
  m.def("linear_many(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] zeros, Tensor?[] bias, int bits, int group, int[] rows, int limbs) -> Tensor[]");
  m.impl("linear_many", c10::DispatchKey::CPU, &linear_many);
  m.def("weight(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, int rows, int columns) -> Tensor");
  m.impl("weight", c10::DispatchKey::CPU, &weight);
  m.def("tile(Tensor words, int bits) -> Tensor");
  m.impl("tile", c10::DispatchKey::CPU, &tile);
  m.def("instructions() -> str", &instructions);
  m.def("rows() -> int", []() -> int64_t { return ROWS; });
}
