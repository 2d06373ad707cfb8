// The CUDA twin of the codecs: checks a batch on the host, then launches.  Build: cacheengine/build.py
//
// Arguments and status as in kv_cuda.cu.  Nothing here waits; the stream orders the launches of one batch.
#include "kv_codec.cuh"

namespace {

using kv::Pages;

constexpr int64_t kMaxGridYZ = 65535;

int64_t launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kv::kOk : kv::kCuda - static_cast<int64_t>(error);
}

template <class F>
int64_t encode(const Pages& p, dim3 grid, cudaStream_t stream) {
  const dim3 threads(kv::kCodecThreads);
  KV_LAUNCH(kv::clear_amax, dim3(grid.x, 1, grid.z), threads, stream, p);
  KV_LAUNCH(kv::find_amax<F>, grid, threads, stream, p);
  KV_LAUNCH(kv::encode_pages<F>, grid, threads, stream, p);
  return launched();
}

template <class F>
int64_t decode(const Pages& p, dim3 grid, cudaStream_t stream) {
  KV_LAUNCH(kv::decode_pages<F>, grid, dim3(kv::kCodecThreads), stream, p);
  return launched();
}

template <class Launch>
int64_t run(const int64_t* words, const int64_t* device_words, int64_t length, Launch launch) {
  if (const int64_t status = kv::check_pages(words, length); status != kv::kOk) return status;
  if (device_words == nullptr) return kv::kMalformed;
  const Pages host = kv::pages(words, words);
  if (2 * host.heads > kMaxGridYZ || host.chunks > kMaxGridYZ) return kv::kTooLarge;
  int64_t longest = 0;
  for (int64_t c = 0; c < host.chunks; ++c) longest = host.count[c] > longest ? host.count[c] : longest;
  if (longest == 0) return kv::kOk;  // an empty grid is a CUDA error
  const dim3 grid(static_cast<unsigned>(longest), static_cast<unsigned>(2 * host.heads),
                  static_cast<unsigned>(host.chunks));
  return launch(kv::pages(words, device_words), grid);
}

}  // namespace

extern "C" int64_t kv_cuda_encode(const int64_t* words, const int64_t* device_words, int64_t length, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return run(words, device_words, length, [on](const Pages& p, dim3 grid) {
    switch (p.kind) {
      case kv::kBf16: return encode<kv::Format<kv::kBf16>>(p, grid, on);
      case kv::kF16: return encode<kv::Format<kv::kF16>>(p, grid, on);
      default: return encode<kv::Format<kv::kF32>>(p, grid, on);
    }
  });
}

extern "C" int64_t kv_cuda_decode(const int64_t* words, const int64_t* device_words, int64_t length, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return run(words, device_words, length, [on](const Pages& p, dim3 grid) {
    switch (p.kind) {
      case kv::kBf16: return decode<kv::Format<kv::kBf16>>(p, grid, on);
      case kv::kF16: return decode<kv::Format<kv::kF16>>(p, grid, on);
      default: return decode<kv::Format<kv::kF32>>(p, grid, on);
    }
  });
}
