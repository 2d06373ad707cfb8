// Kernel bodies of the codecs; kv_kernels.cuh says how one source becomes two builds.
#pragma once
#ifdef CUDA_EMU
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>
#define KV_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include "kv_codec.h"

namespace kv {

constexpr int kCodecThreads = 256;

// Sixteen elements: two 16-byte words of 16-bit values, four of float32; one 16-byte word when coded.
template <class F>
struct Sixteen {
  static constexpr int kWords = sizeof(typename F::Word);
  union {
    uint4 words[kWords];
    typename F::Word values[kVector];
  };
};

template <class F>
__device__ __forceinline__ void load(Sixteen<F>& x, const uint8_t* from) {
#pragma unroll
  for (int i = 0; i < Sixteen<F>::kWords; ++i) x.words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
}

template <class F>
__device__ __forceinline__ void store(const Sixteen<F>& x, uint8_t* to) {
#pragma unroll
  for (int i = 0; i < Sixteen<F>::kWords; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, x.words[i]);
}

union SixteenBytes {
  uint4 word;
  uint8_t values[kVector];
};

// The most of a warp into one word.  Host threads run one after another, each a warp of its own.
__device__ __forceinline__ void most_of_warp(uint32_t* word, uint32_t value) {
#ifdef CUDA_EMU
  *word = value > *word ? value : *word;
#elif __CUDA_ARCH__ >= 800
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) atomicMax(word, value);
#else
  atomicMax(word, value);
#endif
}

struct Place {
  const uint8_t* from;
  uint8_t* to;
};

// The page of this thread block: grid (pages of the longest chunk, heads * 2, chunks).  `from` is null past a
// chunk's last page.
__device__ __forceinline__ Place page_of(const Pages& p, int64_t from_bytes, int64_t to_bytes) {
  const int64_t page = blockIdx.x, chunk = blockIdx.z;
  if (page >= p.count[chunk]) return {nullptr, nullptr};
  return {reinterpret_cast<const uint8_t*>(p.from[chunk]) + page * from_bytes,
          reinterpret_cast<uint8_t*>(p.to[chunk]) + page * to_bytes};
}

// Vector `i` of one head: which pair, and which element of its run.
struct Where {
  int64_t pair, element;
};

__device__ __forceinline__ Where vector_of(const Pages& p, int64_t head, int64_t i) {
  const int64_t a_run = p.run / kVector, mine = i / a_run;  // `mine` counts this head's own pairs
  return {(mine / p.inner * p.heads + head) * p.inner + mine % p.inner, i % a_run * kVector};
}

__device__ __forceinline__ int64_t vectors(const Pages& p) { return p.pairs / p.heads * (p.run / kVector); }

// First launch: the page's head to zeros, before anybody raises it.
__global__ void __launch_bounds__(kCodecThreads) clear_amax(const Pages p) {
  const Place at = page_of(p, p.raw_page(), p.coded_page());
  if (at.from == nullptr || blockIdx.y != 0) return;
  uint4* to = reinterpret_cast<uint4*>(at.to);
  for (int64_t i = threadIdx.x; i < p.head_bytes() / 16; i += kCodecThreads) __stcs(to + i, uint4{0, 0, 0, 0});
}

// Second launch: one thread block finds the amax of one head's K or V.
template <class F>
__global__ void __launch_bounds__(kCodecThreads) find_amax(const Pages p) {
  const int half = blockIdx.y % 2;
  const int64_t head = blockIdx.y / 2;
  const Place at = page_of(p, p.raw_page(), p.coded_page());
  if (at.from == nullptr || !p.codes(half)) return;
  typename F::Signed most = 0;
  for (int64_t i = threadIdx.x; i < vectors(p); i += kCodecThreads) {
    const Where w = vector_of(p, head, i);
    Sixteen<F> x;
    load(x, at.from + p.raw_at(w.pair, half) + w.element * static_cast<int64_t>(sizeof(typename F::Word)));
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const typename F::Signed size = finite_size<F>(x.values[e]);
      most = size > most ? size : most;
    }
  }
  uint32_t* word = reinterpret_cast<uint32_t*>(at.to) + p.amax_word(head, half);
  most_of_warp(word, F::widen(static_cast<typename F::Word>(most)));
}

// Third launch: what is coded becomes bytes, what is not is copied.
template <class F>
__global__ void __launch_bounds__(kCodecThreads) encode_pages(const Pages p) {
  const int half = blockIdx.y % 2;
  const int64_t head = blockIdx.y / 2;
  const Place at = page_of(p, p.raw_page(), p.coded_page());
  if (at.from == nullptr) return;
  const bool coded = p.codes(half);
  const float inverse =
      coded ? inverse_of(reinterpret_cast<const uint32_t*>(at.to)[p.amax_word(head, half)]) : 0.0f;
  for (int64_t i = threadIdx.x; i < vectors(p); i += kCodecThreads) {
    const Where w = vector_of(p, head, i);
    const int64_t raw = w.element * static_cast<int64_t>(sizeof(typename F::Word));
    Sixteen<F> x;
    load(x, at.from + p.raw_at(w.pair, half) + raw);
    uint8_t* to = at.to + p.coded_at(w.pair, half);
    if (coded) {
      SixteenBytes y;
#pragma unroll
      for (int e = 0; e < kVector; ++e) y.values[e] = to_e4m3(F::widen(x.values[e]), inverse);
      __stcs(reinterpret_cast<uint4*>(to + w.element), y.word);
    } else {
      store(x, to + raw);
    }
  }
}

template <class F>
__global__ void __launch_bounds__(kCodecThreads) decode_pages(const Pages p) {
  const int half = blockIdx.y % 2;
  const int64_t head = blockIdx.y / 2;
  const Place at = page_of(p, p.coded_page(), p.raw_page());
  if (at.from == nullptr) return;
  const bool coded = p.codes(half);
  const float scale =
      coded ? scale_of(reinterpret_cast<const uint32_t*>(at.from)[p.amax_word(head, half)]) : 0.0f;
  for (int64_t i = threadIdx.x; i < vectors(p); i += kCodecThreads) {
    const Where w = vector_of(p, head, i);
    const int64_t raw = w.element * static_cast<int64_t>(sizeof(typename F::Word));
    const uint8_t* from = at.from + p.coded_at(w.pair, half);
    Sixteen<F> x;
    if (coded) {
      SixteenBytes y;
      y.word = __ldcs(reinterpret_cast<const uint4*>(from + w.element));
#pragma unroll
      for (int e = 0; e < kVector; ++e) x.values[e] = decode_one<F>(y.values[e], scale);
    } else {
      load(x, from + raw);
    }
    store(x, at.to + p.raw_at(w.pair, half) + raw);
  }
}

}  // namespace kv
