// The CPU twin of the codecs: whole chunks from a slot to scratch and back.  Build: cacheengine/build.py
//
// The loops are plain C++ that compilers vectorise; each is compiled for AVX-512, AVX2 and the baseline, and the
// machine's own choice is made once.  A page is read twice, the second time from the cache.
#include <cstring>

#include "kv_codec.h"

#define KV_INLINE inline __attribute__((always_inline))

namespace {

using kv::Pages;

enum Verb { kEncode, kDecode };

template <class F>
KV_INLINE uint32_t amax_of(const typename F::Word* from, int64_t run, uint32_t so_far) {
  typename F::Signed most = 0;
  for (int64_t i = 0; i < run; ++i) {
    const typename F::Signed size = kv::finite_size<F>(from[i]);
    most = size > most ? size : most;
  }
  const uint32_t bits = F::widen(static_cast<typename F::Word>(most));
  return bits > so_far ? bits : so_far;
}

template <class F>
KV_INLINE void encode_run(uint8_t* __restrict to, const typename F::Word* __restrict from, int64_t run, float inverse) {
  for (int64_t i = 0; i < run; ++i) to[i] = kv::to_e4m3(F::widen(from[i]), inverse);
}

template <class F>
KV_INLINE void decode_run(typename F::Word* __restrict to, const uint8_t* __restrict from, int64_t run, float scale) {
  for (int64_t i = 0; i < run; ++i) to[i] = kv::decode_one<F>(from[i], scale);
}

template <class F>
KV_INLINE void encode_page(const Pages& p, const uint8_t* raw, uint8_t* coded) {
  using Word = typename F::Word;
  uint32_t* amax = reinterpret_cast<uint32_t*>(coded);
  std::memset(coded, 0, static_cast<size_t>(p.head_bytes()));
  for (int64_t pair = 0; pair < p.pairs; ++pair)
    for (int half = 0; half < 2; ++half)
      if (p.codes(half)) {
        uint32_t& most = amax[p.amax_word(p.head(pair), half)];
        most = amax_of<F>(reinterpret_cast<const Word*>(raw + p.raw_at(pair, half)), p.run, most);
      }
  for (int64_t pair = 0; pair < p.pairs; ++pair)
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = raw + p.raw_at(pair, half);
      uint8_t* to = coded + p.coded_at(pair, half);
      if (p.codes(half)) {
        const float inverse = kv::inverse_of(amax[p.amax_word(p.head(pair), half)]);
        encode_run<F>(to, reinterpret_cast<const Word*>(from), p.run, inverse);
      } else {
        std::memcpy(to, from, static_cast<size_t>(p.raw_run()));
      }
    }
}

template <class F>
KV_INLINE void decode_page(const Pages& p, const uint8_t* coded, uint8_t* raw) {
  const uint32_t* amax = reinterpret_cast<const uint32_t*>(coded);
  for (int64_t pair = 0; pair < p.pairs; ++pair)
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = coded + p.coded_at(pair, half);
      uint8_t* to = raw + p.raw_at(pair, half);
      if (p.codes(half)) {
        const float scale = kv::scale_of(amax[p.amax_word(p.head(pair), half)]);
        decode_run<F>(reinterpret_cast<typename F::Word*>(to), from, p.run, scale);
      } else {
        std::memcpy(to, from, static_cast<size_t>(p.raw_run()));
      }
    }
}

template <Verb kVerb, class F>
KV_INLINE void walk(const Pages& p) {
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(p.from[chunk]);
    uint8_t* to = reinterpret_cast<uint8_t*>(p.to[chunk]);
    for (int64_t page = 0; page < p.count[chunk]; ++page) {
      if (kVerb == kEncode) {
        encode_page<F>(p, from + page * p.raw_page(), to + page * p.coded_page());
      } else {
        decode_page<F>(p, from + page * p.coded_page(), to + page * p.raw_page());
      }
    }
  }
}

template <Verb kVerb>
KV_INLINE void walk_any(const Pages& p) {
  switch (p.kind) {
    case kv::kBf16: return walk<kVerb, kv::Format<kv::kBf16>>(p);
    case kv::kF16: return walk<kVerb, kv::Format<kv::kF16>>(p);
    default: return walk<kVerb, kv::Format<kv::kF32>>(p);
  }
}

using Walk = void (*)(const Pages&);

void encode_base(const Pages& p) { walk_any<kEncode>(p); }
void decode_base(const Pages& p) { walk_any<kDecode>(p); }

#if defined(__x86_64__)
#define KV_AVX2 __attribute__((target("avx2")))
#define KV_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
KV_AVX2 void encode_avx2(const Pages& p) { walk_any<kEncode>(p); }
KV_AVX2 void decode_avx2(const Pages& p) { walk_any<kDecode>(p); }
KV_AVX512 void encode_avx512(const Pages& p) { walk_any<kEncode>(p); }
KV_AVX512 void decode_avx512(const Pages& p) { walk_any<kDecode>(p); }

// 0: the baseline; 1: AVX2; 2: AVX-512.
int64_t best() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return __builtin_cpu_supports("avx2") ? 1 : 0;
}

constexpr Walk kEncoders[] = {encode_base, encode_avx2, encode_avx512};
constexpr Walk kDecoders[] = {decode_base, decode_avx2, decode_avx512};
#else
int64_t best() { return 0; }

constexpr Walk kEncoders[] = {encode_base};
constexpr Walk kDecoders[] = {decode_base};
#endif

// `level` -1 is the machine's best; a level above that is refused rather than run.
int64_t run(const Walk* walks, const int64_t* words, int64_t length, int64_t level) {
  if (const int64_t status = kv::check_pages(words, length); status != kv::kOk) return status;
  static const int64_t kBest = best();
  if (level > kBest) return kv::kMalformed;
  walks[level < 0 ? kBest : level](kv::pages(words, words));
  return kv::kOk;
}

}  // namespace

extern "C" int64_t kv_cpu_encode(const int64_t* words, int64_t length, int64_t level) {
  return run(kEncoders, words, length, level);
}

extern "C" int64_t kv_cpu_decode(const int64_t* words, int64_t length, int64_t level) {
  return run(kDecoders, words, length, level);
}
