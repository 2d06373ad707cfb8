// Scaled 8-bit floats for KV pages: the arithmetic, and a batch of pages, said once for both twins.
//
// A value x of a group (the K or the V of one head in one page) is stored as e4m3(x / scale), 8 bits: "OCP 8-bit
// Floating Point Specification" (2023), E4M3: largest finite value 448, no infinities.  The scale is the smallest
// power of two that brings the group's amax within 448, as in "OCP Microscaling Formats" (2023) but for a whole
// group.  Dividing by a power of two is exact, so the one rounding is e4m3's own (to nearest, ties to even), twins
// cannot differ in it, and coding what was decoded gives it back unchanged.  NaN and the infinities become NaN;
// amax is taken over the finite values.
//
// A page is `pairs` times a run of K and as many elements of V; pair p belongs to head (p / inner) % heads.
// Its encoded form:
//
//   amax  [heads][coded halves]   float32; zeros up to a multiple of 16 bytes
//   pairs [pairs]                 the run of K, the run of V: a byte an element where coded, else as it was
//
// A batch is one array of int64 words:
//
//   coded, kind, heads, inner, pairs, run, chunks   header
//   from  [chunks]   address of each chunk's first page; both sides are multiples of 16
//   to    [chunks]
//   pages [chunks]   pages lie one after another
#pragma once
#include <initializer_list>

#include "kv_batch.h"

namespace kv {

enum Coded : int64_t { kCodedK = 1, kCodedV = 2 };  // which halves become 8 bits
enum Kind : int64_t { kBf16, kF16, kF32 };

constexpr int64_t kCodecWords = 7;
constexpr int64_t kVector = 16;  // elements a thread codes at once; every run is a multiple
constexpr int64_t kLargest = 1 << 24;

struct Pages {
  int64_t coded, kind, heads, inner, pairs, run, chunks;
  const int64_t *from, *to, *count;

  KV_BOTH int64_t width() const { return kind == kF32 ? 4 : 2; }
  KV_BOTH bool codes(int half) const { return coded >> half & 1; }
  KV_BOTH int64_t halves() const { return codes(0) + codes(1); }
  KV_BOTH int64_t head(int64_t pair) const { return pair / inner % heads; }
  KV_BOTH int64_t amax_word(int64_t head, int half) const {
    return head * halves() + (half && codes(0) ? 1 : 0);
  }
  KV_BOTH int64_t head_bytes() const { return (heads * halves() * 4 + 15) / 16 * 16; }
  KV_BOTH int64_t raw_run() const { return run * width(); }
  KV_BOTH int64_t coded_run(int half) const { return codes(half) ? run : raw_run(); }
  KV_BOTH int64_t raw_page() const { return pairs * 2 * raw_run(); }
  KV_BOTH int64_t coded_page() const { return head_bytes() + pairs * (coded_run(0) + coded_run(1)); }
  KV_BOTH int64_t raw_at(int64_t pair, int half) const { return (2 * pair + half) * raw_run(); }
  KV_BOTH int64_t coded_at(int64_t pair, int half) const {
    return head_bytes() + pair * (coded_run(0) + coded_run(1)) + (half ? coded_run(0) : 0);
  }
};

// `header` is read on the host; the tables are found behind `words`, which may live on the device.
inline Pages pages(const int64_t* header, const int64_t* words) {
  Pages p{header[0], header[1], header[2], header[3], header[4], header[5], header[6], nullptr, nullptr, nullptr};
  p.from = words + kCodecWords;
  p.to = p.from + p.chunks;
  p.count = p.to + p.chunks;
  return p;
}

// Refuses before any pointer is followed.  `words` is host memory, `length` counts words.
inline int64_t check_pages(const int64_t* words, int64_t length) {
  if (words == nullptr || length < kCodecWords) return kMalformed;
  const Pages p = pages(words, words);
  if (p.chunks < 0 || p.chunks > length || length != kCodecWords + 3 * p.chunks) return kMalformed;
  if (p.coded < 1 || p.coded > 3 || p.kind < kBf16 || p.kind > kF32) return kMalformed;
  for (const int64_t size : {p.heads, p.inner, p.pairs, p.run})
    if (size < 1 || size > kLargest) return kMalformed;
  if (p.pairs % (p.heads * p.inner) || p.run % kVector || p.pairs * p.run > kLargest) return kMalformed;
  for (int64_t c = 0; c < p.chunks; ++c) {
    if (p.from[c] == 0 || p.to[c] == 0 || (p.from[c] | p.to[c]) % 16) return kMalformed;
    if (p.count[c] < 0 || p.count[c] > kLargest) return kMalformed;
  }
  return kOk;
}

KV_BOTH float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

KV_BOTH uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr uint32_t exponent(int biased) { return static_cast<uint32_t>(biased) << 23; }

// The biased exponent of the scale for an amax given as float32 bits: 1 to 247 whatever the bits say.
KV_BOTH uint32_t scale_exponent(uint32_t amax) {
  // 448 = 1.75 * 2^8: a mantissa above .75 needs the next power
  const uint32_t up = ((amax & 0x7fffffffu) + 0x1fffffu) >> 23;
  return up > 255 ? 247 : up > 9 ? up - 8 : 1;
}

KV_BOTH float scale_of(uint32_t amax) { return as_float(scale_exponent(amax) << 23); }
KV_BOTH float inverse_of(uint32_t amax) { return as_float((254 - scale_exponent(amax)) << 23); }

// x as float32 bits -> e4m3(x * inverse).  Branchless, so that compilers can vectorise it.
KV_BOTH uint8_t to_e4m3(uint32_t x, float inverse) {
  const uint32_t sign = x >> 24 & 0x80, size = x & 0x7fffffffu;
  const float y = as_float(size) * inverse;
  const uint32_t u = as_bits(y);
  const uint32_t normal = (u - exponent(120) + 0x7ffffu + (u >> 20 & 1)) >> 20;
  const uint32_t tiny = as_bits(y + 16384.0f) - as_bits(16384.0f);  // its last place is e4m3's smallest step
  const uint32_t rounded = u < exponent(121) ? tiny : normal;
  return static_cast<uint8_t>(size < 0x7f800000u ? rounded | sign : 0x7f);
}

// The size of e4m3 `byte`, sign dropped, NaN as anything.
KV_BOTH float from_e4m3(uint8_t byte) {
  const uint32_t size = byte & 0x7f;
  const float tiny = as_float(exponent(121) + (size << 20)) - as_float(exponent(121));
  return size < 8 ? tiny : as_float((size << 20) + exponent(120));
}

// The three 16- and 32-bit formats.  narrow() rounds to nearest even and stops at the largest finite value.
template <int64_t kKind>
struct Format;

template <>
struct Format<kBf16> {
  using Word = uint16_t;
  using Signed = int16_t;
  static constexpr Signed kSize = 0x7fff, kInfinite = 0x7f80;
  static constexpr Word kNaN = 0x7fc0;
  static KV_BOTH uint32_t widen(Word w) { return static_cast<uint32_t>(w) << 16; }
  static KV_BOTH Word narrow(float y, uint32_t sign) {
    const uint32_t u = as_bits(y);
    const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    return static_cast<Word>((rounded < 0x7f7fu ? rounded : 0x7f7fu) | sign << 8);
  }
};

template <>
struct Format<kF16> {
  using Word = uint16_t;
  using Signed = int16_t;
  static constexpr Signed kSize = 0x7fff, kInfinite = 0x7c00;
  static constexpr Word kNaN = 0x7e00;
  static KV_BOTH uint32_t widen(Word w) {
    const uint32_t size = w & 0x7fffu, wide = size << 13;
    const uint32_t tiny = as_bits(as_float(exponent(113) + wide) - as_float(exponent(113)));
    const uint32_t finite = size < 0x400u ? tiny : wide + exponent(112);
    return (size < 0x7c00u ? finite : 0x7fc00000u) | static_cast<uint32_t>(w & 0x8000u) << 16;
  }
  static KV_BOTH Word narrow(float y, uint32_t sign) {
    const uint32_t u = as_bits(y);
    const uint32_t tiny = as_bits(y + 0.5f) - as_bits(0.5f);
    const uint32_t normal = (u - exponent(112) + 0xfffu + (u >> 13 & 1)) >> 13;
    const uint32_t rounded = u < exponent(113) ? tiny : normal;
    return static_cast<Word>((rounded < 0x7bffu ? rounded : 0x7bffu) | sign << 8);
  }
};

template <>
struct Format<kF32> {
  using Word = uint32_t;
  using Signed = int32_t;
  static constexpr Signed kSize = 0x7fffffff, kInfinite = 0x7f800000;
  static constexpr Word kNaN = 0x7fc00000;
  static KV_BOTH uint32_t widen(Word w) { return w; }
  static KV_BOTH Word narrow(float y, uint32_t sign) {
    const uint32_t u = as_bits(y);
    return (u < 0x7f7fffffu ? u : 0x7f7fffffu) | sign << 24;
  }
};

template <class F>
KV_BOTH typename F::Word decode_one(uint8_t byte, float scale) {
  const typename F::Word word = F::narrow(from_e4m3(byte) * scale, byte & 0x80u);
  return (byte & 0x7f) == 0x7f ? F::kNaN : word;
}

// The size of a word as an integer that orders as its value does; nothing for what is not finite.
template <class F>
KV_BOTH typename F::Signed finite_size(typename F::Word word) {
  const typename F::Signed size = static_cast<typename F::Signed>(word & F::kSize);
  return size < F::kInfinite ? size : 0;
}

}  // namespace kv
