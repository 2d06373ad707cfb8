// A batch of block moves, and everything a kernel assumes about it, said once.
//
// A batch is one array of int64 words, the same for both twins, so that the CUDA side needs one copy to the
// device and one launch however many chunks move:
//
//   layers, chunks, block_bytes, block_stride, num_blocks     header
//   bases  [layers]        address of block 0 of each layer
//   slots  [chunks]        address of each chunk's slot
//   first  [chunks + 1]    where a chunk's block ids begin in `blocks`; the last word is their total
//   blocks [first[chunks]] block ids, chunk by chunk; a scatter leaves kSkip out: the device has that block
//
// Block b of layer l lies at bases[l] + b * block_stride and is block_bytes long.  A slot holds a chunk of n
// blocks densely as [layer][n][block_bytes].  Blocks are opaque bytes: no kernel knows dtypes or heads.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define KV_BOTH __host__ __device__ __forceinline__
#else
#define KV_BOTH inline
#endif

namespace kv {

enum Direction { kGather, kScatter };  // paged -> slots, slots -> paged

// What check() and the launchers return.  A positive value is 1 + the position in `blocks` of a bad id.
enum Status : int64_t { kOk = 0, kMalformed = -1, kTooLarge = -2, kCuda = -1000 };

constexpr int64_t kHeaderWords = 5;
constexpr int64_t kSkip = -1;

struct Batch {
  int64_t layers, chunks, block_bytes, block_stride, num_blocks;
  const int64_t *bases, *slots, *first, *blocks;

  KV_BOTH uint8_t* page(int64_t layer, int64_t block) const {
    return reinterpret_cast<uint8_t*>(bases[layer]) + block * block_stride;
  }
  KV_BOTH uint8_t* cell(int64_t chunk, int64_t layer, int64_t row) const {
    const int64_t n = first[chunk + 1] - first[chunk];
    return reinterpret_cast<uint8_t*>(slots[chunk]) + (layer * n + row) * block_bytes;
  }
};

// `header` is read on the host; the tables are found behind `words`, which may live on the device.
inline Batch view(const int64_t* header, const int64_t* words) {
  Batch b{header[0], header[1], header[2], header[3], header[4], nullptr, nullptr, nullptr, nullptr};
  b.bases = words + kHeaderWords;
  b.slots = b.bases + b.layers;
  b.first = b.slots + b.chunks;
  b.blocks = b.first + b.chunks + 1;
  return b;
}

// Refuses before any pointer is followed.  `words` is host memory, `length` counts words.
inline int64_t check(const int64_t* words, int64_t length, Direction direction) {
  if (words == nullptr || length < kHeaderWords) return kMalformed;
  const int64_t layers = words[0], chunks = words[1];
  // each table is bounded by the whole before lengths are added, so nothing below can overflow
  if (layers < 1 || layers > length || chunks < 0 || chunks > length) return kMalformed;
  const int64_t fixed = kHeaderWords + layers + 2 * chunks + 1;
  if (length < fixed) return kMalformed;
  const Batch b = view(words, words);
  if (b.block_bytes < 1 || b.block_stride < b.block_bytes || b.num_blocks < 0) return kMalformed;
  for (int64_t l = 0; l < layers; ++l)
    if (b.bases[l] == 0) return kMalformed;
  if (b.first[0] != 0 || b.first[chunks] != length - fixed) return kMalformed;
  for (int64_t c = 0; c < chunks; ++c)
    if (b.slots[c] == 0 || b.first[c] > b.first[c + 1]) return kMalformed;
  for (int64_t i = 0; i < b.first[chunks]; ++i)
    if ((b.blocks[i] < 0 || b.blocks[i] >= b.num_blocks) &&
        !(direction == kScatter && b.blocks[i] == kSkip))
      return 1 + i;
  return kOk;
}

}  // namespace kv

// Lets cacheengine/build.py recognise a library built from these very sources.
#ifdef KV_BUILD_MARK
[[gnu::used]] static const char kBuildMark[] = KV_BUILD_MARK;
#endif
