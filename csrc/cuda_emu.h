// CUDA on the host, as much of it as copy kernels need: a launch is a loop over blocks and threads.
//
// Threads of a block run to their end one after another, so a kernel that synchronises or shuffles cannot run
// here.  The order is backwards on purpose: code that secretly relies on thread 0 going first fails.
// A misaligned vector access faults here as it would on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 blockIdx, threadIdx;

#define __global__ static
#define __device__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

// The promise of alignment makes 16 bytes one aligned access, which faults when the promise is false.
template <class T>
inline T __ldcs(const T* from) {
  return *static_cast<const T*>(__builtin_assume_aligned(from, alignof(T)));
}
template <class T>
inline void __stcs(T* to, T value) {
  *static_cast<T*>(__builtin_assume_aligned(to, alignof(T))) = value;
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emu {
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, Args... args) {
  for (unsigned z = grid.z; z-- > 0;)
    for (unsigned y = grid.y; y-- > 0;)
      for (unsigned x = grid.x; x-- > 0;)
        for (unsigned t = block.x; t-- > 0;) {
          blockIdx = dim3(x, y, z);
          threadIdx = dim3(t);
          kernel(args...);
        }
}
}  // namespace emu

#define KV_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), emu::launch(kernel, grid, block, __VA_ARGS__))
