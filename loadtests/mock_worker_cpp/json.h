// Just enough JSON to read a request.  What is not JSON reads as null.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

struct Json {
  enum Kind { NONE, TRUTH, NUMBER, STRING, ARRAY, OBJECT } kind = NONE;
  bool truth = false;
  double number = 0;
  std::string text;
  std::vector<Json> items;         // of an array; of an object, the values
  std::vector<std::string> names;  // of an object

  const Json& operator[](const char* name) const {
    static const Json none;
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return items[i];
    return none;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : at_(text.data()), end_(text.data() + text.size()) {}

  Json value(int depth = 0) {
    Json out;
    char c = peek();
    if (depth > 64 || !c) return out;
    if (c == '"') {
      out.kind = Json::STRING;
      out.text = string();
    } else if (c == '{' || c == '[') {
      group(out, c == '{', depth);
    } else if (c == 't' || c == 'f' || c == 'n') {
      out.kind = c == 'n' ? Json::NONE : Json::TRUTH;
      out.truth = c == 't';
      while (at_ < end_ && *at_ >= 'a' && *at_ <= 'z') ++at_;
    } else {
      out.kind = Json::NUMBER;
      char* stop = nullptr;
      out.number = strtod(at_, &stop);  // the buffer is a std::string's: it ends with a zero
      at_ = stop == at_ ? end_ : stop;
    }
    return out;
  }

 private:
  char peek() {
    while (at_ < end_ && strchr(" \t\r\n", *at_)) ++at_;
    return at_ < end_ ? *at_ : 0;
  }

  void group(Json& out, bool object, int depth) {
    out.kind = object ? Json::OBJECT : Json::ARRAY;
    ++at_;
    for (char c; (c = peek()) && c != '}' && c != ']';) {
      if (c == ',') {
        ++at_;
        continue;
      }
      if (object) {
        if (c != '"') return void(at_ = end_);
        out.names.push_back(string());
        if (peek() == ':') ++at_;
      }
      out.items.push_back(value(depth + 1));
    }
    if (at_ < end_) ++at_;
  }

  std::string string() {
    std::string out;
    for (++at_; at_ < end_ && *at_ != '"'; ++at_) {
      if (*at_ != '\\' || at_ + 1 >= end_) {
        out += *at_;
        continue;
      }
      char c = *++at_;
      if (c == 'u' && at_ + 4 < end_) {
        utf8(out, uint32_t(strtoul(std::string(at_ + 1, 4).c_str(), nullptr, 16)));
        at_ += 4;
      } else {
        const char* found = strchr("n\nt\tr\rb\bf\f", c);
        out += found ? found[1] : c;
      }
    }
    if (at_ < end_) ++at_;
    return out;
  }

  static void utf8(std::string& out, uint32_t code) {  // halves of a pair stay halves: nobody prints them
    if (code < 0x80) {
      out += char(code);
    } else if (code < 0x800) {
      out += {char(0xc0 | code >> 6), char(0x80 | (code & 63))};
    } else {
      out += {char(0xe0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
    }
  }

  const char* at_;
  const char* end_;
};

inline Json parse_json(const std::string& text) { return JsonReader(text).value(); }
