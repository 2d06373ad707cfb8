// The CUDA twin: checks a batch on the host, then launches once.  Build: cacheengine/build.py
//
// `words` is the batch in host memory, `device_words` the same words where the GPU can read them (the caller
// copies them on `stream`, so that an allocator that knows streams owns both).  Slots are pinned host memory
// or device memory.  Returns a kv::Status; below kCuda it is kCuda - cudaError_t.  Nothing here waits.
#include "kv_kernels.cuh"

namespace {

constexpr int64_t kMaxGridYZ = 65535;

template <kv::Direction kDirection>
int64_t launch(const int64_t* words, const int64_t* device_words, int64_t length, void* stream) {
  if (const int64_t status = kv::check(words, length, kDirection); status != kv::kOk) return status;
  if (device_words == nullptr) return kv::kMalformed;
  const kv::Batch host = kv::view(words, words);
  if (host.layers > kMaxGridYZ || host.chunks > kMaxGridYZ) return kv::kTooLarge;
  int64_t rows = 0;
  for (int64_t c = 0; c < host.chunks; ++c) {
    const int64_t n = host.first[c + 1] - host.first[c];
    rows = n > rows ? n : rows;
  }
  if (rows > INT32_MAX) return kv::kTooLarge;
  if (rows == 0) return kv::kOk;  // an empty grid is a CUDA error
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(host.layers),
                  static_cast<unsigned>(host.chunks));
  KV_LAUNCH(kv::move_blocks<kDirection>, grid, dim3(kv::kThreads), static_cast<cudaStream_t>(stream),
            kv::view(words, device_words));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kv::kOk : kv::kCuda - static_cast<int64_t>(error);
}

}  // namespace

extern "C" int64_t kv_cuda_gather(const int64_t* words, const int64_t* device_words, int64_t length,
                                  void* stream) {
  return launch<kv::kGather>(words, device_words, length, stream);
}

extern "C" int64_t kv_cuda_scatter(const int64_t* words, const int64_t* device_words, int64_t length,
                                   void* stream) {
  return launch<kv::kScatter>(words, device_words, length, stream);
}
