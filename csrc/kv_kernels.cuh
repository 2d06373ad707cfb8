// Kernel bodies.  One source, two builds: nvcc for GPUs; a C++ compiler with -DCUDA_EMU for machines without
// (cuda_emu.h), which is how the tests run these very lines anywhere.
#pragma once
#ifdef CUDA_EMU
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>
#define KV_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include "kv_batch.h"

namespace kv {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // 16-byte loads a thread issues before its first store

// Data passes once: streaming loads and stores leave the L2 to the attention kernels beside us.
__device__ __forceinline__ void copy_words(uint4* __restrict__ to, const uint4* __restrict__ from, int64_t n) {
  int64_t i = threadIdx.x;
  for (; i + (kInFlight - 1) * kThreads < n; i += kInFlight * kThreads) {
    uint4 word[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) word[u] = __ldcs(from + i + u * kThreads);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) __stcs(to + i + u * kThreads, word[u]);
  }
  for (; i < n; i += kThreads) __stcs(to + i, __ldcs(from + i));
}

__device__ __forceinline__ void copy_bytes(uint8_t* __restrict__ to, const uint8_t* __restrict__ from, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = from[i];
}

// One thread block moves one KV block of one layer: grid (rows of the longest chunk, layers, chunks).
// Gather and scatter are the same walk with the page on the other side.
template <Direction kDirection>
__global__ void __launch_bounds__(kThreads) move_blocks(const Batch b) {
  const int64_t row = blockIdx.x, layer = blockIdx.y, chunk = blockIdx.z;
  const int64_t begin = b.first[chunk];
  if (row >= b.first[chunk + 1] - begin) return;  // a shorter chunk
  if (b.blocks[begin + row] == kSkip) return;
  uint8_t* page = b.page(layer, b.blocks[begin + row]);
  uint8_t* cell = b.cell(chunk, layer, row);
  uint8_t* to = kDirection == kGather ? cell : page;
  const uint8_t* from = kDirection == kGather ? page : cell;

  // Pages of real models are multiples of 16 bytes; anything else is copied correctly, not quickly.
  const uintptr_t both = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  const int64_t words = both % sizeof(uint4) == 0 ? b.block_bytes / sizeof(uint4) : 0;
  copy_words(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(from), words);
  const int64_t done = words * sizeof(uint4);
  copy_bytes(to + done, from + done, b.block_bytes - done);
}

}  // namespace kv
