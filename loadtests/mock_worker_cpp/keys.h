// A prompt's tokens, and Cairn's chunk keys of them (docs/keys.md): the mock's cache names chunks as the gateway
// does, so that the gateway can find them in the index.  SHA-256 is FIPS 180-4.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

using Key = std::array<char, 16>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t word;
    memcpy(&word, key.data(), sizeof word);
    return word;
  }
};

// Words to token ids.  A word is one token with the blank before it, so a prompt of such words is tokenized by
// looking each up; the file has "<word> <id>" lines.  Other words get an id nobody else has.
class Words {
 public:
  explicit Words(const std::string& path) {
    std::ifstream file(path);
    std::string word;
    for (uint32_t id; file >> word >> id;) ids_[word] = id;
  }

  void tokens(const std::string& text, std::vector<uint32_t>& out) const {
    for (size_t at = 0; (at = text.find_first_not_of(" \n\t", at)) != std::string::npos;) {
      size_t end = std::min(text.find_first_of(" \n\t", at), text.size());
      std::string word = text.substr(at, end - at);
      auto found = ids_.find(word);
      out.push_back(found != ids_.end() ? found->second : uint32_t(std::hash<std::string>()(word)) | 1u << 31);
      at = end;
    }
  }

 private:
  std::unordered_map<std::string, uint32_t> ids_;
};

class Sha256 {
 public:
  static Key first16(const std::string& message) {
    Sha256 hash;
    std::string padded = message + '\x80';
    padded.resize((message.size() + 9 + 63) / 64 * 64, '\0');
    uint64_t bits = 8 * message.size();
    for (int i = 0; i < 8; ++i) padded[padded.size() - 1 - i] = char(bits >> 8 * i);
    for (size_t at = 0; at < padded.size(); at += 64)
      hash.block(reinterpret_cast<const uint8_t*>(padded.data()) + at);
    Key out;
    for (int i = 0; i < 16; ++i) out[i] = char(hash.h_[i / 4] >> (24 - 8 * (i % 4)));
    return out;
  }

 private:
  static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

  void block(const uint8_t* in) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; ++i) w[i] = in[4 * i] << 24 | in[4 * i + 1] << 16 | in[4 * i + 2] << 8 | in[4 * i + 3];
    for (int i = 16; i < 64; ++i)
      w[i] = w[i - 16] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
             (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, h_, sizeof v);
    for (int i = 0; i < 64; ++i) {
      uint32_t a = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
                   k[i] + w[i];
      uint32_t b = (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) +
                   ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      memmove(v + 1, v, 7 * sizeof *v);
      v[4] += a;
      v[0] = a + b;
    }
    for (int i = 0; i < 8; ++i) h_[i] += v[i];
  }

  uint32_t h_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
};

// Keys of the full chunks; `root` is key_{-1}, 16 bytes.
inline std::vector<Key> chunk_keys(const std::string& root, const std::vector<uint32_t>& tokens, size_t chunk) {
  std::vector<Key> keys;
  std::string before = root;
  for (size_t at = 0; at + chunk <= tokens.size(); at += chunk) {
    std::string message = before;
    for (size_t i = at; i < at + chunk; ++i)
      for (int shift = 0; shift < 32; shift += 8) message += char(tokens[i] >> shift);
    keys.push_back(Sha256::first16(message));
    before.assign(keys.back().data(), keys.back().size());
  }
  return keys;
}

// key_{-1} of prompts under a `cache_salt`: the namespace, and the salt as a typed tag.
inline std::string salted_root(const std::string& name_space, const std::string& salt) {
  std::string message = name_space + '\x02';
  for (int shift = 0; shift < 32; shift += 8) message += char(salt.size() >> shift);
  Key key = Sha256::first16(message + salt);
  return std::string(key.data(), key.size());
}

inline std::string hex(const Key& key) {
  std::string out;
  for (char c : key) out += {"0123456789abcdef"[c >> 4 & 15], "0123456789abcdef"[c & 15]};
  return out;
}

inline std::string unhex(const std::string& text) {
  std::string out;
  for (size_t at = 0; at + 1 < text.size(); at += 2) out += char(strtoul(text.substr(at, 2).c_str(), nullptr, 16));
  return out;
}
