// Products of tiles of 16 x 16 by the matrix unit (AMX), in two ways. `Pairs`: the same integer sums as those of `multiply`,
// which become floats in the same order, so a row's result does not depend on how many rows are multiplied with it.
// `RealPairs`: for many rows of bfloat16. Codes less zeros are bfloat16 numbers exactly, so only sums are rounded, to float32.
#pragma once
#if defined(HAS_AVX512) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && \
    defined(__linux__) && !defined(AUTO_ROUND_NO_AMX)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int SIDE = 16;                 // rows of a tile register
constexpr int64_t WIDE = 64;             // bytes of such a row
constexpr int64_t CODES_AT_ONCE = 1 << 14;   // bytes of unpacked codes: they wait in the first-level cache
constexpr int64_t INPUTS_AT_ONCE = 1 << 20;  // bytes of limbs: these in the second-level one

// Linux gives the tile registers only to programs that ask.
bool may_use_amx() {
  static const bool granted = [] {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of <asm/prctl.h>
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return granted;
}

// All sums and inputs have `height` rows; codes have a row per four columns, of which there are `depth` at once.
class Tiles {
 public:
  Tiles(int64_t height, int64_t depth) {
    struct alignas(64) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } c = {};
    c.palette = 1;
    for (int i = 0; i < 8; ++i) {
      c.rows[i] = static_cast<uint8_t>(i < 6 ? height : depth / 4);
      c.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth : WIDE);
    }
    _tile_loadconfig(&c);
  }
  ~Tiles() { _tile_release(); }
};

using Side = int32_t[SIDE][SIDE];  // [row of x][row of the weight]

// Room that starts where a line of the cache does.
class Room {
 public:
  explicit Room(int64_t bytes) : held(bytes + WIDE) {}
  uint8_t* start() { return held.data() + (-reinterpret_cast<uintptr_t>(held.data()) & (WIDE - 1)); }

 private:
  std::vector<uint8_t> held;
};

// totals: [part][tile][row of x][row of the weight], of parts first .. last. Rounds and stores them.
template <typename Y>
void finish(const float* totals, int64_t first, int64_t last, int64_t height, const int64_t (&tiles)[2], const float* bias,
            Y* y, int64_t m, int64_t rows) {
  for (int64_t t = 0; t <= tiles[1] - tiles[0]; ++t) {
    const int64_t row = tiles[t] * ROWS;
    for (int64_t r = first * height; r < std::min(m, last * height); ++r)
      put(totals + ((2 * (r / height - first) + t) * height + r % height) * ROWS, bias ? bias + row : nullptr,
          y + r * rows + row, std::min<int64_t>(ROWS, rows - row));
  }
}

// The tiles from .. to with parts of the inputs, as many as stay in the second-level cache.
template <int BITS, int LIMBS, typename Y>
class Pairs {
 public:
  Pairs(const Weights& w_, const Inputs& in_, const float* bias_, Y* y_, int64_t m_, int64_t rows_)
      : w(w_), in(in_), bias(bias_), y(y_), m(m_), rows(rows_), block(in.block), height(in.height),
        depth(std::min<int64_t>(block, WIDE)), some(std::max<int64_t>(1, CODES_AT_ONCE / (2 * block * SIDE))),
        near(std::max<int64_t>(1, INPUTS_AT_ONCE / (height * in.blocks * block * LIMBS))),
        room(2 * some * block * SIDE), totals(2 * near * height * ROWS), configured(height, depth), codes(room.start()) {}

  void multiply(int64_t from, int64_t to) {
    const int64_t parts = (m + height - 1) / height;
    for (int64_t part = 0; part < parts; part += near)
      for (int64_t tile = from; tile < to; tile += 2) {
        tiles[0] = tile;
        tiles[1] = std::min(tile + 1, to - 1);
        const int64_t end = std::min(parts, part + near);
        std::fill(totals.begin(), totals.end(), 0.0f);
        for (int64_t b = 0; b < in.blocks; b += some) add_blocks(b, std::min(in.blocks, b + some), part, end);
        finish(totals.data(), part, end, height, tiles, bias, y, m, rows);
      }
  }

 private:
  const Weights& w;
  const Inputs& in;
  const float* bias;
  Y* y;
  const int64_t m, rows, block, height, depth, some, near;  // some: blocks of columns at once; near: parts
  Room room;
  std::vector<float> totals;
  const Tiles configured;
  uint8_t* const codes;
  int64_t tiles[2];
  alignas(WIDE) Side sums[2][LIMBS][2];  // those of one block are still being made while those of another are used

  void add_blocks(int64_t first, int64_t last, int64_t part, int64_t end) {
    const int64_t units = block / UNIT;
    for (int t = 0; t < 2; ++t)
      for (int64_t u = first * units; u < last * units; ++u)
        unpack<BITS>(w.codes + (tiles[t] * w.units + u) * Unit<BITS>::bytes,
                     codes + ((t * some - first) * units + u) * QUADS * VECTOR);
    __asm__ volatile("" ::: "memory");  // GCC 12 does not know that tile loads read memory
    const int64_t count = (end - part) * (last - first);
    for (int64_t i = 0; i <= count; ++i) {
      if (i < count) sum_block(part + i / (last - first), first + i % (last - first), first, sums[i % 2]);
      if (i > 0) end_block(part + (i - 1) / (last - first), first + (i - 1) % (last - first), part, sums[(i - 1) % 2]);
    }
  }

  // Sums over block b of columns. Registers 0 .. 3 hold sums, 4 and 5 inputs, 6 and 7 codes.
  inline void sum_block(int64_t part, int64_t b, int64_t first, Side (*to)[2]) {
    const int8_t* x = in.limbs.data() + (part * in.blocks + b) * height * LIMBS * block;
    const uint8_t *left = codes + (b - first) * block * SIDE, *right = left + some * block * SIDE;
    sum_limbs<LIMBS >= 2>(x, left, right, to);
    if constexpr (LIMBS == 3) sum_limbs<false>(x + 2 * height * block, left, right, to + 2);
  }

  template <bool TWO>
  inline void sum_limbs(const int8_t* x, const uint8_t* left, const uint8_t* right, Side (*to)[2]) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t c = 0; c < block; c += depth) {
      _tile_loadd(4, x + c, block);
      _tile_loadd(6, left + c * SIDE, WIDE);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, right + c * SIDE, WIDE);
      _tile_dpbsud(1, 4, 7);
      if constexpr (TWO) {
        _tile_loadd(5, x + height * block + c, block);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, to[0][0], WIDE);
    _tile_stored(1, to[0][1], WIDE);
    if constexpr (TWO) {
      _tile_stored(2, to[1][0], WIDE);
      _tile_stored(3, to[1][1], WIDE);
    }
  }

  // totals += scales * (sums less zeros), as `multiply` of kernels.cpp ends a block.
  inline void end_block(int64_t part, int64_t b, int64_t first, const Side (*from)[2]) {
    const int64_t at = (part * in.blocks + b) * height, group = b * block / w.group;
    float* total = totals.data() + (part - first) * 2 * height * ROWS;
    for (int t = 0; t < 2; ++t) {
      const int64_t offset = (tiles[t] * w.groups + group) * ROWS;
      const Floats scale = scaled(w.scales + offset, 1.0f);
      const uint8_t* zeros = w.zeros ? w.zeros + offset : nullptr;
      const int32_t* sum = &in.sums[at * SUMS<LIMBS>];
      const float* factor = &in.scale[at];
      const int64_t h = height;
      for (int64_t r = 0; r < h; ++r, total += ROWS) {
        Ints a[LIMBS];
        UNROLL for (int l = 0; l < LIMBS; ++l) a[l] = _mm512_load_si512(from[l][t][r]);
        const Floats value = whole<BITS, LIMBS>(a, zeros, sum + r * SUMS<LIMBS>);
        store(total, add_product(value, times(scale, factor[r]), _mm512_loadu_ps(total)));
      }
    }
  }
};

// x in bfloat16, in parts of `height` rows: [part][32 columns][row][column]; what is missing is zero.
struct Halves {
  static constexpr int64_t DEEP = 32;  // columns of a tile register
  int64_t parts, height, deeps;
  Room room;
  c10::BFloat16* x;

  Halves(const c10::BFloat16* given, int64_t m, int64_t columns, int64_t padded)
      : parts((m + SIDE - 1) / SIDE), height((m + parts - 1) / parts), deeps(padded / DEEP),
        room(2 * parts * height * padded), x(reinterpret_cast<c10::BFloat16*>(room.start())) {
    at::parallel_for(0, m, 4, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        for (int64_t d = 0; d * DEEP < columns; ++d)
          std::memcpy(at(row / height, d) + row % height * DEEP, given + row * columns + d * DEEP,
                      2 * std::min(DEEP, columns - d * DEEP));
    });
  }
  c10::BFloat16* at(int64_t part, int64_t deep) const { return x + (part * deeps + deep) * height * DEEP; }
};

// (codes - zero) of a unit as bfloat16: [two columns][row][column], 16 rows of a tile register.
template <int BITS>
inline void unpack_real(const uint8_t* p, Floats zero, uint8_t* out) {
  alignas(WIDE) uint8_t codes[QUADS * VECTOR];
  unpack<BITS>(p, codes);
  const Ints byte = _mm512_set1_epi32(255);
  UNROLL for (int q = 0; q < QUADS; ++q) {
    const Ints four = _mm512_load_si512(codes + q * VECTOR);
    const auto real_at = [&](Ints v) {
      return _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(v, byte)), zero));
    };
    // The upper half of a float32 is a bfloat16.
    const Ints a = _mm512_srli_epi32(real_at(four), 16), b = real_at(_mm512_srli_epi32(four, 8));
    const Ints c = _mm512_srli_epi32(real_at(_mm512_srli_epi32(four, 16)), 16), d = real_at(_mm512_srli_epi32(four, 24));
    _mm512_store_si512(out + 2 * q * WIDE, _mm512_or_si512(a, b));
    _mm512_store_si512(out + (2 * q + 1) * WIDE, _mm512_or_si512(c, d));
  }
}

// Pairs of tiles with pairs of parts of the inputs.
template <int BITS>
class RealPairs {
 public:
  RealPairs(const Weights& w_, const Halves& in_, int64_t block_, const float* bias_, c10::BFloat16* y_, int64_t m_,
            int64_t rows_)
      : w(w_), in(in_), bias(bias_), y(y_), m(m_), rows(rows_), deep(block_ / Halves::DEEP),
        some(std::max<int64_t>(1, CODES_AT_ONCE / (4 * block_ * SIDE))),
        near(2 * std::max<int64_t>(1, INPUTS_AT_ONCE / (4 * in.height * in.deeps * Halves::DEEP))),
        room(4 * some * block_ * SIDE), totals(2 * near * in.height * ROWS), configured(in.height, WIDE) {}

  void multiply(int64_t from, int64_t to) {
    const int64_t blocks = in.deeps / deep;
    for (int64_t part = 0; part < in.parts; part += near)
      for (int64_t tile = from; tile < to; tile += 2) {
        tiles[0] = tile;
        tiles[1] = std::min(tile + 1, to - 1);
        const int64_t end = std::min(in.parts, part + near);
        std::fill(totals.begin(), totals.end(), 0.0f);
        for (int64_t b = 0; b < blocks; b += some) add_blocks(b, std::min(blocks, b + some), part, end);
        finish(totals.data(), part, end, in.height, tiles, bias, y, m, rows);
      }
  }

 private:
  const Weights& w;
  const Halves& in;
  const float* bias;
  c10::BFloat16* y;
  const int64_t m, rows, deep, some, near;  // deep: registers of columns in a block; some: blocks at once; near: parts
  Room room;
  std::vector<float> totals;
  const Tiles configured;
  int64_t tiles[2];
  alignas(WIDE) float sums[2][2][2][SIDE][SIDE];  // [one block or the next][part][tile]

  int64_t group_of(int64_t b) const { return b * deep * Halves::DEEP / w.group; }
  uint8_t* codes(int64_t tile, int64_t b) { return room.start() + (tile * some + b) * deep * WIDE * SIDE; }

  void add_blocks(int64_t first, int64_t last, int64_t part, int64_t end) {
    for (int t = 0; t < 2; ++t)
      for (int64_t b = first; b < last; ++b) {
        const int64_t offset = (tiles[t] * w.groups + group_of(b)) * ROWS;
        const Floats zero = w.zeros ? real(wide(w.zeros + offset)) : _mm512_set1_ps(1 << (BITS - 1));
        for (int64_t d = 0; d < deep; ++d)
          unpack_real<BITS>(w.codes + (tiles[t] * w.units + b * deep + d) * Unit<BITS>::bytes, zero,
                            codes(t, b - first) + d * WIDE * SIDE);
      }
    __asm__ volatile("" ::: "memory");  // GCC 12 does not know that tile loads read memory
    const int64_t steps = last - first, count = (end - part + 1) / 2 * steps;
    for (int64_t i = 0; i <= count; ++i) {
      if (i < count) {
        const int64_t p = part + 2 * (i / steps), b = first + i % steps;
        if (p + 1 < end) sum_block<true>(p, b, first, sums[i % 2]);
        else sum_block<false>(p, b, first, sums[i % 2]);
      }
      if (i > 0) end_block(2 * ((i - 1) / steps), end - part, first + (i - 1) % steps, sums[(i - 1) % 2]);
    }
  }

  template <bool TWO>
  inline void sum_block(int64_t part, int64_t b, int64_t first, float (*to)[2][SIDE][SIDE]) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const uint8_t *left = codes(0, b - first), *right = codes(1, b - first);
    for (int64_t d = 0; d < deep; ++d) {
      _tile_loadd(6, left + d * WIDE * SIDE, WIDE);
      _tile_loadd(4, in.at(part, b * deep + d), WIDE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + d * WIDE * SIDE, WIDE);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TWO) {
        _tile_loadd(5, in.at(part + 1, b * deep + d), WIDE);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to[0][0], WIDE);
    _tile_stored(1, to[0][1], WIDE);
    if constexpr (TWO) {
      _tile_stored(2, to[1][0], WIDE);
      _tile_stored(3, to[1][1], WIDE);
    }
  }

  // totals += scales * sums. part: from the first in totals, of which there are `parts`.
  inline void end_block(int64_t part, int64_t parts, int64_t b, const float (*from)[2][SIDE][SIDE]) {
    const int64_t height = in.height;
    float* total = totals.data() + part * 2 * height * ROWS;
    for (int64_t p = 0; p < std::min<int64_t>(2, parts - part); ++p)
      for (int t = 0; t < 2; ++t) {
        const Floats scale = scaled(w.scales + (tiles[t] * w.groups + group_of(b)) * ROWS, 1.0f);
        for (int64_t r = 0; r < height; ++r, total += ROWS)
          store(total, add_product(_mm512_load_ps(from[p][t][r]), scale, _mm512_loadu_ps(total)));
      }
  }
};

}  // namespace
#endif
