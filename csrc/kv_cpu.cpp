// The CPU twin: moves blocks between a paged KV cache and chunk slots in host memory.  Build: cacheengine/build.py
//
// Cold memory is the case that counts: both sides are gigabytes, and a chunk is touched once.  A plain copy
// then reads every destination line only to overwrite it.  Streaming stores skip that read, and walking four
// 4 KiB pages side by side keeps four hardware prefetchers busy; glibc does the same, but only above a
// threshold derived from the shared cache, which a block never reaches.  SSE2 is enough (it is memory bound)
// and every x86-64 has it, so the library runs wherever it was built for.  loadtests/micro/bench_gather.py
// has the figures.
#include <cstring>

#include "kv_batch.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

#if defined(__SSE2__)
constexpr int64_t kPage = 4096, kStreams = 4;

void stream_line(uint8_t* to, const uint8_t* from) {
  const __m128i* s = reinterpret_cast<const __m128i*>(from);
  __m128i* d = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(s), b = _mm_loadu_si128(s + 1);
  const __m128i c = _mm_loadu_si128(s + 2), e = _mm_loadu_si128(s + 3);
  _mm_stream_si128(d, a);
  _mm_stream_si128(d + 1, b);
  _mm_stream_si128(d + 2, c);
  _mm_stream_si128(d + 3, e);
}

void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (; bytes >= kStreams * kPage; bytes -= kStreams * kPage) {
      for (int64_t line = 0; line < kPage; line += 64)
        for (int64_t page = 0; page < kStreams; ++page)
          stream_line(to + page * kPage + line, from + page * kPage + line);
      to += kStreams * kPage;
      from += kStreams * kPage;
    }
  }
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Streaming stores are weakly ordered: whoever is told of this batch must see its bytes.
void publish() { _mm_sfence(); }
#else
void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void publish() {}
#endif

template <kv::Direction kDirection>
int64_t move(const int64_t* words, int64_t length) {
  if (const int64_t status = kv::check(words, length, kDirection); status != kv::kOk) return status;
  const kv::Batch b = kv::view(words, words);
  for (int64_t chunk = 0; chunk < b.chunks; ++chunk) {
    const int64_t* blocks = b.blocks + b.first[chunk];
    const int64_t rows = b.first[chunk + 1] - b.first[chunk];
    for (int64_t layer = 0; layer < b.layers; ++layer) {
      for (int64_t row = 0; row < rows; ++row) {
        if (blocks[row] == kv::kSkip) continue;
        uint8_t* page = b.page(layer, blocks[row]);
        uint8_t* cell = b.cell(chunk, layer, row);
        if (kDirection == kv::kGather) {
          copy(cell, page, b.block_bytes);
        } else {
          copy(page, cell, b.block_bytes);
        }
      }
    }
  }
  publish();
  return kv::kOk;
}

}  // namespace

extern "C" int64_t kv_cpu_gather(const int64_t* words, int64_t length) {
  return move<kv::kGather>(words, length);
}

extern "C" int64_t kv_cpu_scatter(const int64_t* words, int64_t length) {
  return move<kv::kScatter>(words, length);
}
