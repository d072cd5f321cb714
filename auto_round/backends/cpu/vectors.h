// Codes, sums and floats of a tile at once: 16 rows with AVX-512, 8 with AVX2 (and VNNI where the processor has it) or in
// plain C++. A vector holds four columns of each row.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(AUTO_ROUND_PLAIN)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && \
    !defined(AUTO_ROUND_NARROW)
#define HAS_AVX512 1
#define HAS_VNNI 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
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

#if defined(HAS_AVX512)
constexpr int ROWS = 16;
#else
constexpr int ROWS = 8;
#endif
constexpr int UNIT = 32, QUADS = 8, VECTOR = 4 * ROWS;
#define UNROLL _Pragma("GCC unroll 8")

#if defined(HAS_AVX512)
using Bytes = __m512i;  // 64 unsigned codes
using Ints = __m512i;   // one int32 per row
using Sums = __m512i;
using Floats = __m512;  // one float per row

inline Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int SHIFT, int MASK>
inline Bytes field(Bytes v) {
  return _mm512_and_si512(_mm512_srli_epi16(v, SHIFT), _mm512_set1_epi8(static_cast<char>(MASK)));
}
template <int AT>
inline Bytes with_bit(Bytes v, Bytes high) {  // v | 4 * bit AT of each byte of high
  Bytes moved = AT >= 2 ? _mm512_srli_epi16(high, AT >= 2 ? AT - 2 : 0) : _mm512_slli_epi16(high, AT < 2 ? 2 - AT : 0);
  return _mm512_or_si512(v, _mm512_and_si512(moved, _mm512_set1_epi8(4)));
}
inline Bytes quad(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}
inline Ints none() { return _mm512_setzero_si512(); }
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums add_dot(Sums s, Bytes v, Bytes x) { return _mm512_dpbusd_epi32(s, v, x); }
template <int WEIGHT>
inline Ints widen(Ints a, Sums s) { return _mm512_add_epi32(a, s); }
inline Ints add_bytes(Ints a, Ints b) { return _mm512_add_epi32(a, _mm512_slli_epi32(b, 8)); }
inline Ints minus(Ints a, int32_t b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }
inline Ints wide(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Ints minus_zeros(Ints a, const uint8_t* zeros, int32_t sum) {
  return _mm512_sub_epi32(a, _mm512_mullo_epi32(wide(zeros), _mm512_set1_epi32(sum)));
}
inline Floats real(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats add_scaled(Floats a, float factor, Floats to) { return _mm512_fmadd_ps(a, _mm512_set1_ps(factor), to); }
inline Floats add_product(Floats a, Floats b, Floats to) { return _mm512_fmadd_ps(a, b, to); }
inline Floats scaled(const uint16_t* scales, float factor) {
  __m512 s = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
  return _mm512_mul_ps(s, _mm512_set1_ps(factor));
}
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline Floats times(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void spill(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
#elif defined(HAS_AVX2)
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
inline Ints add_bytes(Ints a, Ints b) { return _mm256_add_epi32(a, _mm256_slli_epi32(b, 8)); }
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
inline void spill(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
#else
struct Bytes { uint8_t b[VECTOR]; };
struct Ints { int32_t i[ROWS]; };
struct Floats { float f[ROWS]; };

inline Bytes load(const uint8_t* p) {
  Bytes v;
  std::memcpy(v.b, p, VECTOR);
  return v;
}
template <int SHIFT, int MASK>
inline Bytes field(Bytes v) {
  for (auto& b : v.b) b = (b >> SHIFT) & MASK;
  return v;
}
template <int AT>
inline Bytes with_bit(Bytes v, Bytes high) {
  for (int i = 0; i < VECTOR; ++i) v.b[i] |= ((high.b[i] >> AT) & 1) << 2;
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
inline Ints add_bytes(Ints a, Ints b) {  // a + 256 b
  for (int r = 0; r < ROWS; ++r) a.i[r] += 256 * b.i[r];
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
inline void spill(uint8_t* p, Bytes v) { std::memcpy(p, v.b, sizeof(v.b)); }
#endif

template <typename Y>
inline void put_all(const float* v, const float* bias, Y* y) {
  for (int i = 0; i < ROWS; ++i) y[i] = static_cast<Y>(bias ? v[i] + bias[i] : v[i]);
}
#if defined(HAS_AVX512) && defined(__AVX512BF16__)
inline void put_all(const float* v, const float* bias, c10::BFloat16* y) {
  __m512 all = _mm512_loadu_ps(v);
  if (bias) all = _mm512_add_ps(all, _mm512_loadu_ps(bias));
  const __m256bh rounded = _mm512_cvtneps_pbh(all);
  std::memcpy(y, &rounded, sizeof(rounded));
}
#endif

// How a unit is stored. `part` unpacks the vectors at `piece`, `per_piece` of them, to a code per byte. 8 bits are two
// planes of 4 where only 16-bit sums exist.
template <int BITS>
struct Unit {
  static constexpr int bytes = VECTOR * BITS;
#if defined(HAS_AVX2) && !defined(HAS_VNNI)
  static constexpr int planes = BITS == 8 ? 2 : 1;
#else
  static constexpr int planes = 1;
#endif
  static constexpr int per_piece = BITS == 8 ? 1 : BITS == 4 ? 2 : 4, pieces = QUADS / per_piece;

  template <int PIECE>
  static inline void part(const uint8_t* p, Bytes (*v)[planes]) {
    Bytes w = load(p + VECTOR * PIECE);
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
        Bytes high = load(p + VECTOR * 2);
        v[0][0] = with_bit<4 * PIECE>(v[0][0], high);
        v[1][0] = with_bit<4 * PIECE + 1>(v[1][0], high);
        v[2][0] = with_bit<4 * PIECE + 2>(v[2][0], high);
        v[3][0] = with_bit<4 * PIECE + 3>(v[3][0], high);
      }
    }
  }
};

}  // namespace
